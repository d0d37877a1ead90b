"""``shared.client``, blocking and asynchronous: what is asked, repeated, fetched and reported."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from shared.client import (
    AsyncRolloutClient,
    RolloutClient,
    RolloutProgress,
    WireFormat,
    rollout_request,
)
from shared.client.headers import request_headers
from shared.errors import ConflictError, SlipstreamError, UnavailableError, UnknownResourceError
from shared.msgpack_bodies import pack, unpack
from shared.schemas.rollouts import PromptItem, RolloutResponse, RolloutStatusResponse, RolloutUsage
from shared.schemas.weights import WeightsResponse
from shared.types import RolloutRunState
from tests.fakes.answering import FakeTime, answer_with, answering, silence, status, stream, weights
from tests.fakes.rollouts import rollout_group, rollout_sample

REQUEST = rollout_request(["a", [1, 2], PromptItem(prompt="c")], n=2, reward="length")
USAGE = RolloutUsage(
    num_prompt_tokens=1, num_completion_tokens=3, num_draft_tokens=0, num_accepted_tokens=0
)


def sync_client(url: str, time: FakeTime, timeout_s: float = 60.0) -> RolloutClient:
    return RolloutClient(url, timeout_s=timeout_s, pause=time.pause, clock=time.clock)


def async_client(url: str, time: FakeTime, timeout_s: float = 60.0) -> AsyncRolloutClient:
    async def pause(delay_s: float) -> object:
        return time.pause(delay_s)

    return AsyncRolloutClient(url, timeout_s=timeout_s, pause=pause, clock=time.clock)


def status_of(state: RolloutRunState, num_finished: int) -> RolloutStatusResponse:
    group = rollout_group(samples=[rollout_sample(0, reward=1.0)])
    result = RolloutResponse(request_id="r", groups=[group], usage=USAGE)
    return RolloutStatusResponse(
        request_id="r",
        state=state,
        num_groups=3,
        num_finished_groups=num_finished,
        result=result if state is RolloutRunState.FINISHED else None,
    )


def test_a_request_has_an_id_of_its_own_and_takes_prompts_in_every_form() -> None:
    assert REQUEST.request_id != rollout_request(["a"]).request_id
    assert [item.prompt for item in REQUEST.prompts] == ["a", None, "c"]
    assert REQUEST.prompts[1].prompt_token_ids == [1, 2]
    assert REQUEST.reward is not None
    assert (REQUEST.reward.name, REQUEST.stream) == ("length", True)


async def test_the_asynchronous_client_takes_up_a_broken_stream_like_the_blocking_one() -> None:
    answers = [status(503, "3"), stream(1, end=None), stream(1, 0, end=None), stream(1, 0, 2)]
    received_by, pauses = [], []
    for client_of in (sync_client, async_client):
        time = FakeTime()
        with answering(*answers) as (url, received):
            if client_of is sync_client:
                with sync_client(url, time) as blocking:
                    groups = await asyncio.to_thread(list, blocking.stream_groups(REQUEST))
            else:
                async with async_client(url, time) as client:
                    groups = [group async for group in client.stream_groups(REQUEST)]
        assert [group.prompt_index for group in groups] == [1, 0, 2]
        received_by.append(received)
        pauses.append(time.pauses_s)
    assert received_by[0] == received_by[1]
    assert len(received_by[0]) == 4
    assert pauses[0] == pauses[1]
    assert pauses[0][0] == 3.0


async def test_progress_counts_each_group_once_over_all_connections() -> None:
    seen: list[RolloutProgress] = []
    with answering(stream(1, end=None), stream(1, 0, 2)) as (url, _):
        async with async_client(url, FakeTime()) as client:
            async for _ in client.stream_groups(REQUEST, seen.append):
                pass
    assert [progress.num_finished_groups for progress in seen] == [1, 2, 3]
    assert {progress.num_groups for progress in seen} == {3}
    assert [progress.num_completion_tokens for progress in seen] == [3, 6, 9]


def test_a_result_is_waited_for_as_long_as_groups_finish() -> None:
    time = FakeTime()
    running = [answer_with(status_of(RolloutRunState.RUNNING, index // 8)) for index in range(16)]
    finished = answer_with(status_of(RolloutRunState.FINISHED, 3))
    with (
        answering(*running, finished) as (url, received),
        sync_client(url, time, timeout_s=5.0) as client,
    ):
        assert client.result("run/step=1").usage == USAGE
    assert received[0] == ("GET /v1/rollouts/run/step=1", None)
    assert sum(time.pauses_s) > 5.0


def test_a_result_that_gets_no_further_is_given_up_with_where_it_stood() -> None:
    running = [answer_with(status_of(RolloutRunState.RUNNING, 2))] * 6
    with (
        answering(*running) as (url, _),
        sync_client(url, FakeTime(), timeout_s=2.0) as client,
        pytest.raises(UnavailableError, match=r"timeout_s 2.*2 of 3 groups are finished"),
    ):
        client.result("r")


async def test_an_unknown_and_a_failed_result_are_errors() -> None:
    failed = answer_with(status_of(RolloutRunState.FAILED, 0))
    with answering(status(404, error="not_found"), failed) as (url, _):
        async with async_client(url, FakeTime()) as client:
            with pytest.raises(UnknownResourceError):
                await client.result("r")
            with pytest.raises(SlipstreamError, match="rollouts r failed"):
                await client.result("r")


def test_silence_is_reported_with_what_was_waited_for_and_how_long() -> None:
    released = threading.Event()
    with (
        answering(silence(released)) as (url, _),
        RolloutClient(url, timeout_s=0.2) as client,
    ):
        with pytest.raises(
            UnavailableError, match=r"weight status at .*: nothing arrived within 0\.2 s"
        ):
            client.weights()
        released.set()


async def test_a_server_that_shuts_down_is_asked_again_by_the_asynchronous_client() -> None:
    answers = stream(1, end="error", error_code="unavailable"), stream(1, 0, 2)
    with answering(*answers) as (url, received):
        async with async_client(url, FakeTime()) as client:
            groups = [group async for group in client.stream_groups(REQUEST)]
    assert [group.prompt_index for group in groups] == [1, 0, 2]
    assert len(received) == 2


def test_what_the_caller_does_between_groups_is_not_waiting() -> None:
    time = FakeTime()
    with (
        answering(stream(0, end=None), stream(0, 1, 2)) as (url, _),
        sync_client(url, time, timeout_s=10.0) as client,
    ):
        indices = []
        for group in client.stream_groups(REQUEST):
            indices.append(group.prompt_index)
            time.now_s += 1000.0  # a training step
    assert indices == [0, 1, 2]


def test_a_conflict_is_an_error_of_its_own() -> None:
    with (
        answering(status(409, error="conflict")) as (url, _),
        sync_client(url, FakeTime()) as client,
        pytest.raises(ConflictError),
    ):
        client.rollout(REQUEST)


async def test_aborting_tells_whether_the_server_knew_the_request() -> None:
    known = answer_with(status_of(RolloutRunState.FINISHED, 1))
    with answering(status(404), known) as (url, _):
        async with async_client(url, FakeTime()) as client:
            assert [await client.abort("r"), await client.abort("r")] == [False, True]


@pytest.mark.parametrize(
    ("url", "accepted", "is_compressed"),
    [
        ("http://127.0.0.1:8000", "application/json", False),
        ("http://[::1]:8000", "application/json", False),
        ("http://localhost:8000", "application/json", False),
        ("http://node-7:8000", "application/msgpack, application/json;q=0.9", True),
    ],
)
def test_bytes_are_saved_only_where_they_travel(
    url: str, accepted: str, is_compressed: bool
) -> None:
    headers = request_headers(url)
    assert headers["Accept"] == accepted
    assert ("Accept-Encoding" in headers) is not is_compressed  # else httpx offers what it can read
    assert headers["Content-Type"] == "application/json"


def test_the_key_goes_with_every_request() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        body = WeightsResponse(committed_version=1, engines=[], history=[])
        return httpx.Response(200, content=body.model_dump_json())

    transport = httpx.MockTransport(answer)
    with RolloutClient("http://127.0.0.1", api_key="secret", transport=transport) as client:
        client.weights()
    assert [request.headers["authorization"] for request in seen] == ["Bearer secret"]


async def test_a_stream_of_messagepack_is_read_however_it_is_cut() -> None:
    lines: list[dict[str, object]] = [
        {
            "type": "group",
            "request_id": "r",
            "group": rollout_group(
                samples=[rollout_sample(0, reward=1.0)], prompt_index=index
            ).model_dump(mode="json"),
        }
        for index in (2, 0, 1)
    ]
    lines.append({"type": "done", "request_id": "r", "usage": USAGE.model_dump()})
    body = b"".join(map(pack, lines))

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    def answer(request: httpx.Request) -> httpx.Response:
        assert unpack(request.content)["request_id"] == REQUEST.request_id
        return httpx.Response(
            200, content=pieces(), headers={"content-type": "application/msgpack"}
        )

    async with AsyncRolloutClient(
        "http://node-7",
        wire_format=WireFormat.MSGPACK,
        transport=httpx.MockTransport(answer),
    ) as client:
        response = await client.rollout(REQUEST)
    assert [group.prompt_index for group in response.groups] == [0, 1, 2]
    assert response.usage == USAGE


def test_lines_of_json_are_read_however_they_are_cut() -> None:
    body = b'\n{"type":"done","request_id":"r","usage":%b}\n' % USAGE.model_dump_json().encode()

    def pieces() -> Iterator[bytes]:
        yield from (body[index : index + 1] for index in range(len(body)))

    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=pieces()))
    with RolloutClient("http://127.0.0.1", transport=transport) as client:
        assert client.rollout(REQUEST).groups == []


def test_the_weights_of_a_server_are_read_by_both_clients() -> None:
    async def ask(url: str) -> int:
        async with async_client(url, FakeTime()) as client:
            return (await client.weights()).committed_version

    with answering(weights(5), weights(6)) as (url, received):
        assert asyncio.run(ask(url)) == 5
        with sync_client(url, FakeTime()) as client:
            assert client.weights().committed_version == 6
    assert received == [("GET /v1/weights", None)] * 2
