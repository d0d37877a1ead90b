"""Late groups whose last samples change engines, over engines that sample token by token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import pytest

from rollout_server.engine.protocol import GenerateRequest
from rollout_server.router.dispatch_queue import DispatchQueue, Reserved
from rollout_server.router.live_group import LiveGroup
from rollout_server.router.router import RoutedResult, Router
from rollout_server.router.stragglers import MIN_GROUPS, StragglerLimits
from shared.errors import EngineError
from shared.schemas.rollouts import SamplingOptions
from shared.types import FinishReason
from tests.fakes.pool import FakePool
from tests.fakes.routers import ONE, router_over, spawn
from tests.fakes.service import until
from tests.fakes.walking_engine import WalkingEngine, completion

LIMITS = StragglerLimits(max_samples=2, patience=1.0)
SEVERAL_LOOKS = 8
LONG_PROMPT = next([1, 2, n] for n in range(100) if len(completion([1, 2, n], 64)) > 12)
SHORT_PROMPT = next([3, n] for n in range(100) if len(completion([3, n], 64)) < 6)


def ask(name: str, n: int = 1, prompt: list[int] = LONG_PROMPT, **sampling: Any) -> GenerateRequest:
    options = SamplingOptions(max_tokens=64, **sampling)
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, n=n, sampling=options)


@dataclass(kw_only=True, slots=True)
class World:
    """One group is stuck on ``a`` after four tokens; ``b`` and ``c`` are quick."""

    router: Router
    a: WalkingEngine
    b: WalkingEngine
    c: WalkingEngine
    late: asyncio.Task[RoutedResult]
    may_stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Lets ``a`` hear that it should stop, where that is held up."""

    def check_books(self) -> None:
        assert [self.router.num_reserved(name) for name in "abc"] == [0, 0, 0]


@asynccontextmanager
async def late_group(
    request: GenerateRequest, limits: StragglerLimits | None = LIMITS, room: int = 4
) -> AsyncIterator[World]:
    a, b, c = WalkingEngine("a", stalls_after=4), WalkingEngine("b"), WalkingEngine("c")
    a.committed_version, b.committed_version = 3, 4
    async with router_over([a, b, c], room=room, stragglers=limits) as (router, _):
        (late,) = spawn(router, request)
        await until(lambda: a.num_running == request.n, "it to be on a")
        world = World(router=router, a=a, b=b, c=c, late=late)
        for index in range(MIN_GROUPS):  # now it is known how long groups take
            await router.generate(ask(f"quick-{index}", prompt=SHORT_PROMPT))
        assert len(a.requests) == 1
        yield world


def let_everything_be_late(router: Router) -> None:
    """As if many groups had taken no time at all."""
    for _ in range(MIN_GROUPS):
        quick = LiveGroup(request=ask("quick"), work=None, since_s=monotonic())
        router.stragglers.group_finished(quick)


async def several_looks(engine: WalkingEngine) -> None:
    seen = engine.num_progress_asked
    looks = f"{SEVERAL_LOOKS} looks at {engine.engine_id}"
    await until(lambda: engine.num_progress_asked > seen + SEVERAL_LOOKS, looks)


async def test_the_last_samples_of_a_late_group_go_on_where_there_is_less_to_do() -> None:
    async with late_group(ask("late", n=2)) as world:
        routed = await world.late
        world.check_books()
        stragglers = world.router.stragglers
        assert stragglers.num_handed_over == 2
        rests = [r for r in world.b.requests if r.request_id.startswith("late/")]
        assert stragglers.num_recomputed_tokens == sum(len(r.prompt_token_ids) for r in rests)
        assert stragglers.num_recomputed_tokens > 2 * len(LONG_PROMPT)
        assert world.router.num_retries == 0
    assert (routed.result.engine_id, routed.num_attempts) == ("b", 1)
    assert world.a.aborted == ["late"]
    wanted = completion(LONG_PROMPT, 64)
    for sample in routed.result.samples:
        assert sample.token_ids == wanted
        assert sample.logprobs == [-float(token_id) for token_id in wanted]
        assert [span.version for span in sample.weight_versions] == [3, 4]
        assert (sample.weight_versions[0].start, sample.weight_versions[1].end) == (0, len(wanted))
        assert sample.weight_versions[0].end == sample.weight_versions[1].start
        assert sample.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("request_", "limits"),
    [
        (ask("late", n=2), None),
        (ask("late", n=3), LIMITS),
        (ask("late", n=2, seed=7), LIMITS),
        (ask("late", n=2), StragglerLimits(max_samples=2, patience=1e9)),
    ],
    ids=["by default", "with many unfinished", "with a seed", "with patience"],
)
async def test_others_stay_where_they_are(
    request_: GenerateRequest, limits: StragglerLimits | None
) -> None:
    async with late_group(request_, limits) as world:
        if request_.sampling.seed is None:
            await several_looks(world.a)
        else:
            await asyncio.sleep(0.1)  # nobody looks at what could not go on anyway
        assert world.a.aborted == []
        world.a.stalls_after = None
        assert (await world.late).result.engine_id == "a"
        assert world.router.stragglers.num_handed_over == 0
        world.check_books()


async def test_nothing_moves_to_engines_that_have_as_much_to_do() -> None:
    a, b, c = (WalkingEngine(name, stalls_after=4) for name in "abc")
    async with router_over([a, b, c], stragglers=LIMITS) as (router, _):
        tasks = spawn(router, *(ask(f"g{index}", n=2) for index in range(3)))
        await until(lambda: [e.num_running for e in (a, b, c)] == [2, 2, 2], "all to run")
        let_everything_be_late(router)
        await several_looks(a)
        assert a.aborted == b.aborted == c.aborted == []
        for engine in (a, b, c):
            engine.stalls_after = None
        await asyncio.gather(*tasks)


async def test_room_goes_to_groups_that_wait_before_it_goes_to_late_ones() -> None:
    pool = FakePool([WalkingEngine("a"), WalkingEngine("b")])
    queue = DispatchQueue(pool, max_samples_per_engine=4, engine_wait_timeout_s=60.0)
    four = Reserved(num_samples=4, num_tokens=40)
    await queue.acquire("g0", four)
    await queue.acquire("g1", ONE)
    waiting = asyncio.create_task(queue.acquire("g2", four))
    await until(lambda: queue.num_queued_samples == 4, "the third to wait")
    assert queue.reserve_elsewhere("a", ONE) is None
    queue.withdraw("g2")
    assert await waiting is None
    placement = queue.reserve_elsewhere("a", ONE)
    assert placement is not None
    assert placement.handle.engine_id == "b"
    assert queue.num_reserved("b") == 2
    queue.give_back(placement)
    assert queue.num_reserved("b") == 1
    assert queue.reserve_elsewhere("b", ONE) is None, "a has more to do"


class SlowToStop(WalkingEngine):
    """Hears the stop, and does nothing about it until it is let."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.may_stop = asyncio.Event()

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        await self.may_stop.wait()
        if request_id in self._abort_events:
            self._abort_events[request_id].set()


@asynccontextmanager
async def being_stopped(n: int = 2) -> AsyncIterator[World]:
    """Room for the samples is reserved on b, and a has not stopped them yet."""
    a = SlowToStop("a", stalls_after=4)
    b, c = WalkingEngine("b"), WalkingEngine("c")
    async with router_over([a, b, c], stragglers=LIMITS) as (router, _):
        (late,) = spawn(router, ask("late", n=n))
        await until(lambda: a.num_running == n, "it to be on a")
        await several_looks(a)
        let_everything_be_late(router)
        await until(lambda: a.aborted == ["late"], "the engine to be told")
        assert router.num_reserved("b") == n
        yield World(router=router, a=a, b=b, c=c, late=late, may_stop=a.may_stop)


async def test_a_client_that_aborts_meanwhile_gets_what_there_is() -> None:
    async with being_stopped() as world:
        aborting = asyncio.create_task(world.router.abort("late"))
        await until(lambda: len(world.a.aborted) == 2, "the abort to come too")
        world.may_stop.set()
        samples = (await world.late).result.samples
        await aborting
        world.check_books()
        assert world.b.requests == []
        assert world.router.stragglers.num_handed_over == 0
    assert {sample.finish_reason for sample in samples} == {FinishReason.ABORT}
    assert samples[0].token_ids == completion(LONG_PROMPT, 64)[:4]


async def test_an_engine_that_dies_instead_of_stopping_loses_what_others_would() -> None:
    async with being_stopped() as world:
        world.a.die()
        routed = await world.late
        world.check_books()
        assert (routed.result.engine_id, routed.num_attempts) == ("b", 2)
    assert all(s.token_ids == completion(LONG_PROMPT, 64) for s in routed.result.samples)


async def test_an_engine_that_goes_before_the_samples_come_is_not_waited_for() -> None:
    async with being_stopped() as world:
        world.b.die()
        world.may_stop.set()
        routed = await world.late
        world.check_books()
        assert (routed.result.engine_id, routed.num_attempts) == ("c", 1)
    assert all(s.token_ids == completion(LONG_PROMPT, 64) for s in routed.result.samples)


async def test_samples_that_finish_after_all_need_no_other_engine() -> None:
    async with being_stopped() as world:
        world.a.stalls_after = None
        routed = await world.late
        assert routed.result.engine_id == "a"
        world.check_books()
        assert world.router.stragglers.num_handed_over == 0
        assert world.b.requests == []


async def test_a_caller_that_leaves_frees_the_room_on_both_engines() -> None:
    async with being_stopped() as world:
        world.may_stop.set()
        world.late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await world.late
        world.check_books()


async def test_an_engine_that_fails_while_it_is_stopped_fails_the_group_as_ever() -> None:
    async with being_stopped() as world:
        world.a.fail_with = EngineError("bad step")
        with pytest.raises(EngineError, match="bad step"):
            await world.late
        world.check_books()


async def test_many_groups_over_uneven_engines_come_back_whole_and_once() -> None:
    engines = [WalkingEngine(f"e{i}", step_s=0.001 * 3**i) for i in range(4)]
    prompts = [[7, index] for index in range(60)]
    limits = StragglerLimits(max_samples=4, patience=1.0)
    async with router_over(engines, room=8, stragglers=limits) as (router, _):
        requests = [ask(f"g{i}", n=3, prompt=prompt) for i, prompt in enumerate(prompts)]
        results = await asyncio.gather(*(router.generate(request) for request in requests))
        assert router.stragglers.num_handed_over > 0
        assert all(router.num_reserved(engine.engine_id) == 0 for engine in engines)
    for prompt, routed in zip(prompts, results, strict=True):
        assert [s.token_ids for s in routed.result.samples] == [completion(prompt, 64)] * 3
        assert [s.sample_index for s in routed.result.samples] == [0, 1, 2]
    # A name is used once: no sample ran twice.
    names = [request.request_id for engine in engines for request in engine.requests]
    assert len(names) == len(set(names))


async def test_groups_that_were_aborted_do_not_tell_how_long_groups_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished: list[LiveGroup] = []
    stuck = WalkingEngine("a", stalls_after=2)
    async with router_over([stuck], stragglers=LIMITS) as (router, _):
        monkeypatch.setattr(router.stragglers, "group_finished", finished.append)
        (task,) = spawn(router, ask("given-up"))
        await until(lambda: stuck.num_running == 1, "it to run")
        await router.abort("given-up")
        await task
        stuck.stalls_after = None
        await router.generate(ask("whole"))
    assert [live.request.request_id for live in finished] == ["whole"]
