"""The short form of ``make fuzz``: a server process, raw bodies, clients that leave; and that the
counting notices what it is there for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from benchmarks.harness.http_load import Connection, request_bytes
from benchmarks.harness.modelled_engine import EngineTimes
from benchmarks.harness.modelled_server import ModelledServer
from tests.fuzz.__main__ import KEY, KEYS, SETTINGS, Fuzzed, is_clean, table
from tests.fuzz.aborts import SETTINGS as ABORT_SETTINGS
from tests.fuzz.aborts import AbortCounts, abort_many, left_behind
from tests.fuzz.raw import RawCounts, send_raw_bodies, send_raw_streams
from tests.fuzz.raw_bodies import ROUTES, RawRequest, raw_requests, raw_streams
from tests.fuzz.scraped import answers_by_status, scrape

REQUEST = RawRequest(method="POST", path="/v1/x", content_type="a/b", body=b"{}")


@pytest.fixture(scope="module")
def server() -> Iterator[ModelledServer]:
    with ModelledServer(settings=SETTINGS, keys=KEYS) as running:
        yield running
        assert running.stop() == 0, running.log()


def test_raw_bodies_get_answers_and_never_a_5xx(server: ModelledServer) -> None:
    counts = asyncio.run(send_raw_bodies(server.port, 600, seed=5, key=KEY))
    assert counts.wrong == []
    assert counts.sent == 600
    assert {200, 400, 422} <= set(counts.statuses)
    statuses = answers_by_status(asyncio.run(scrape(server.port, KEY)))
    assert statuses[200] >= counts.statuses[200]
    assert not [status for status in statuses if status >= 500 and status != 503]


def test_broken_requests_do_not_end_the_server(server: ModelledServer) -> None:
    answers = asyncio.run(send_raw_streams(server.port, 100, seed=5))
    assert answers.total() == 100
    assert answers["HTTP/1.1 400"] > 10
    assert server.is_alive


def test_the_same_seed_sends_the_same_and_every_route_gets_its_share() -> None:
    first, again = (list(itertools.islice(raw_requests(7), 400)) for _ in range(2))
    assert first == again
    assert {(request.method, request.path) for request in first} == set(ROUTES)
    assert len({request.body for request in first}) > 300
    assert list(itertools.islice(raw_streams(7), 9)) == list(itertools.islice(raw_streams(7), 9))


def test_clients_that_leave_leave_nothing_behind() -> None:
    times = EngineTimes(step_s=0.005, max_num_seqs=64)
    with ModelledServer(settings=ABORT_SETTINGS, times=times) as server:
        counts = asyncio.run(abort_many(server, 40, 1, seed=5))
        assert server.stop() == 0, server.log()
    assert counts.nothing_stayed, counts
    assert counts.aborted == 80


def test_what_stays_is_seen() -> None:
    body = b'{"request_id": "stays", "prompts": [{"prompt": "a"}], "n": 3}'
    times = EngineTimes(step_s=60.0, max_num_seqs=2)
    with ModelledServer(settings=ABORT_SETTINGS, times=times) as server:

        async def leave_and_look() -> tuple[float, int, int, float]:
            async with Connection(server.port) as connection:
                asking = asyncio.create_task(connection.send(request_bytes("/v1/rollouts", body)))
                while not (await left_behind(server.port))[2]:
                    assert not asking.done()
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            return await left_behind(server.port)

        assert asyncio.run(leave_and_look()) == (3, 3, 3, 1.0)


@pytest.mark.parametrize(
    ("status", "body", "wrong"),
    [
        (200, b"{}", False),
        (400, b'{"error": {"code": "c", "type": "t", "message": "m"}}', False),
        (503, b'{"error": {"code": "c", "type": "t", "message": "m"}}', False),
        (500, b'{"error": {"code": "c", "type": "t", "message": "m"}}', True),
        (400, b"Bad Request", True),
    ],
)
def test_answers_are_judged(status: int, body: bytes, wrong: bool) -> None:
    counts = RawCounts()
    counts.note(REQUEST, status, body)
    assert bool(counts.wrong) is wrong


def test_the_table_is_clean_only_if_every_bar_is_met(server: ModelledServer) -> None:
    run = Fuzzed(server, KEY)
    good = AbortCounts(
        aborted=1000, left_pending=0, left_reserved=0, left_running=0, kv_cache_usage=0.0,
        release_s=0.1, rss_mb=(100.0, 100.2, 100.4),
    )  # fmt: skip
    assert good.rss_mb_per_1000 == pytest.approx(0.2)
    result = table([run], good, 0)
    result["fuzz"] |= {"schema_cases": 5000, "raw_bodies": 10_000}
    assert is_clean(result)
    for part, name, value in [
        ("fuzz", "schema_cases", 4999),
        ("fuzz", "raw_bodies", 9999),
        ("fuzz", "server_errors", 1),
        ("fuzz", "deaths", 1),
        ("fuzz", "rss_growth_mb", 50.0),
        ("aborts", "left_reserved", 1),
        ("aborts", "rss_mb_per_1000", 1.0),
    ]:
        assert not is_clean({**result, part: {**result[part], name: value}})
    assert not is_clean({**result, "wrong_answers": ["status 500"]})
    assert not is_clean({**result, "schema_checks_failed": 1})
