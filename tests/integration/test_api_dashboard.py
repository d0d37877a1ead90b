"""The dashboard's page and its stream of events, over a real HTTP server and fake engines."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from rollout_server.api.dashboard import PAGE_FILES
from shared.schemas.dashboard import FeedEvent, GroupTokens
from shared.types import EngineState
from tests.fakes.busy_service import RecordingCoordinator, train
from tests.fakes.engine import FakeEngine
from tests.fakes.http_server import serving
from tests.fakes.pool import FakePool
from tests.fakes.service import fake_service, until
from tests.fakes.service import running as running_in_process

FAST = {"dashboard": {"interval_s": 0.02, "max_listeners": 2}}
SCORED = {
    "prompts": [{"prompt": "q", "answer": "7"}],
    "n": 2,
    "reward": {"name": "length"},
}


class Stream:
    """Reads named events one after the other."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()

    async def next(self) -> tuple[str, str]:
        name = (await anext(self._lines)).removeprefix("event: ")
        data = (await anext(self._lines)).removeprefix("data: ")
        assert await anext(self._lines) == ""
        return name, data

    async def snapshot(self) -> FeedEvent:
        name, data = await self.next()
        assert name == "snapshot"
        return FeedEvent.model_validate_json(data)

    async def update_where(self, condition: object) -> FeedEvent:
        assert callable(condition)
        for _ in range(500):
            name, data = await self.next()
            assert name == "update"
            event = FeedEvent.model_validate_json(data)
            if condition(event):
                return event
        raise AssertionError("no such update in 500")


@asynccontextmanager
async def listening(client: httpx.AsyncClient, url: str) -> AsyncIterator[Stream]:
    async with client.stream("GET", f"{url}/v1/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Stream(answer)


async def test_a_listener_gets_everything_first_and_then_what_is_new() -> None:
    service = fake_service([FakeEngine("a")], server=FAST)
    async with serving(service) as url, httpx.AsyncClient(timeout=20) as client:
        await client.post(f"{url}/v1/rollouts", json=SCORED)
        await until(lambda: service.dashboard._groups.groups, "the group to be seen")
        async with listening(client, url) as stream:
            first = await stream.snapshot()
            assert first.server is not None
            assert first.server.model == "models/tiny"
            assert first.engines[0].status.engine_id == "a"
            assert [recent.num_samples for recent in first.groups] == [2]
            assert first.rewards is not None
            assert first.rewards[0].mean_reward == 6.0
            update = await stream.update_where(lambda event: event.engines[0].kv_points)
            assert update.server is None
            assert update.groups == []
            assert update.rewards is None
            assert len(update.load) == 1
            greedy = {**SCORED, "sampling": {"temperature": 0}}
            await client.post(f"{url}/v1/rollouts", json=greedy)
            update = await stream.update_where(lambda event: event.groups)
            assert [recent.is_greedy for recent in update.groups] == [True]
            tokens = await client.get(f"{url}/v1/events/groups/{update.groups[0].number}")
            gone = await client.get(f"{url}/v1/events/groups/999")
    detail = GroupTokens.model_validate_json(tokens.content)
    assert detail.prompt == "q"
    assert "".join(detail.samples[1].texts) == update.groups[0].samples[1].preview
    assert detail.samples[1].logprobs == [-0.5] * 6
    assert gone.status_code == 404


async def test_decisions_are_fetched_while_somebody_listens_and_come_once() -> None:
    asked: list[int] = []
    kept: list[int] = []

    class Watched(FakeEngine):
        async def speculation(self, since_step: int):  # type: ignore[no-untyped-def]
            asked.append(since_step)
            kept.extend(len(report.history) for report in service.status_poller.speculation())
            return await super().speculation(since_step)

    service = fake_service([Watched("a")], server=FAST)
    async with serving(service) as url, httpx.AsyncClient(timeout=20) as client:
        await until(lambda: len(asked) > 3, "a few polls")
        assert set(asked) == {2**62}
        async with listening(client, url) as stream:
            await stream.snapshot()
            await until(lambda: asked[-1] == 10, "the poller to go on after the last decision")
        await until(lambda: service.dashboard.num_listeners == 0, "the listener to be gone")
        await until(lambda: asked[-1] == 2**62, "nothing to be asked for any more")
    assert 0 in asked
    assert set(kept) == {0}, "what metrics are made from holds no history"


async def test_an_engine_that_is_lost_and_a_push_are_told() -> None:
    pool = FakePool([FakeEngine("a"), FakeEngine("b")])
    service = fake_service(pool=pool, coordinator=RecordingCoordinator(pool), server=FAST)
    async with serving(service) as url, httpx.AsyncClient(timeout=20) as client:
        async with listening(client, url) as stream:
            await stream.snapshot()
            await stream.update_where(lambda event: len(event.engines) == 2)
            lost = pool.members.pop()
            lost.die("its process ended")
            update = await stream.update_where(lambda event: event.departed)
            assert [engine.status.engine_id for engine in update.engines] == ["a"]
            gone = update.departed[0]
            assert (gone.engine_id, gone.last_state) == ("b", EngineState.SERVING)
            assert gone.reason == "its process ended"
            await train(url, 2)
            update = await stream.update_where(lambda event: event.committed_version == 2)
        async with listening(client, url) as stream:
            first = await stream.snapshot()
    assert [mark[1] for mark in first.commits][-1] == 2
    assert first.pushes is not None
    assert [(row.version, row.committed) for row in first.pushes] == [
        (1, True),
        (2, False),
        (2, True),
    ]
    assert first.pushes[0].phases_s.keys() >= {"verifying", "loading"}
    assert "digest" in (first.pushes[1].error or "")
    assert [gone.engine_id for gone in first.departed] == ["b"]


async def test_no_more_listeners_than_allowed_and_a_place_is_free_when_one_leaves() -> None:
    # No event makes the server notice: it is told when a connection closes.
    service = fake_service(server={"dashboard": {"interval_s": 30.0, "max_listeners": 2}})
    async with serving(service) as url, httpx.AsyncClient(timeout=20) as client:
        async with listening(client, url), listening(client, url):
            refused = await client.get(f"{url}/v1/events")
            assert service.dashboard.num_listeners == 2
        assert refused.status_code == 429
        assert "server.dashboard.max_listeners 2" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        await until(lambda: service.dashboard.num_listeners == 0, "both to be gone")
        async with listening(client, url) as stream:
            await stream.snapshot()


async def test_a_stop_of_the_server_ends_the_stream_with_the_reason() -> None:
    service = fake_service(server=FAST)
    async with httpx.AsyncClient(timeout=20) as client:
        async with serving(service) as url:
            answer = await client.send(client.build_request("GET", f"{url}/v1/events"), stream=True)
            stream = Stream(answer)
            await stream.snapshot()
        # serving() has waited for uvicorn, whose answers must all have ended.
        last = ("", "")
        while last[0] != "end":
            last = await stream.next()
        await answer.aclose()
    assert "shutting down" in last[1]


async def test_updates_come_at_the_interval_however_much_happens() -> None:
    service = fake_service(server={"dashboard": {"interval_s": 30.0}})
    async with running_in_process(service) as client:
        await until(lambda: service.dashboard._load, "the first look")
        listener = service.dashboard.subscribe()
        for _ in range(20):
            await client.post("/v1/rollouts", json=SCORED)
        await service.dashboard.close()
        names = [event.partition(b"\n")[0] async for event in service.dashboard.events(listener)]
    assert names == [b"event: snapshot", b"event: end"]


async def test_the_page_is_whole_and_loads_nothing_from_elsewhere() -> None:
    async with running_in_process(fake_service()) as client:
        page = await client.get("/dashboard")
        references = re.findall(r'(?:src|href)="(dashboard/[^"]+)"', page.text)
        answers = [await client.get(f"/{reference}") for reference in references]
        strange = [await client.get(f"/dashboard/{name}") for name in ("x.js", "..%2Ffeed.py")]
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert {answer.status_code for answer in answers} == {200}
    assert [answer.status_code for answer in strange] == [404, 404]
    script = next(a for a in answers if a.headers["content-type"].startswith("text/javascript"))
    assert script.headers["x-content-type-options"] == "nosniff"
    for name, content in PAGE_FILES.items():
        text = content.decode()
        # The one address is the name of SVG's elements, which nobody fetches.
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|insertAdjacentHTML|\sstyle=|\son\w+=|eval\(", text), name
        assert len(text.splitlines()) <= 300, name
    imported = {
        name
        for content in PAGE_FILES.values()
        for name in re.findall(r'from "\./([\w.]+)"', content.decode())
    }
    assert imported <= PAGE_FILES.keys()


async def test_without_engines_there_are_events_all_the_same() -> None:
    service = fake_service([], server=FAST)
    async with (
        serving(service) as url,
        httpx.AsyncClient(timeout=20) as client,
        listening(client, url) as stream,
    ):
        first = await stream.snapshot()
        update = await stream.update_where(lambda event: True)
    assert first.engines == update.engines == []
    assert update.load[0][1:] == (0.0, 0, 0)
