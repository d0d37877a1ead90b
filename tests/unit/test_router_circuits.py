"""Engines that serve and fail what they are given, over fake engines."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from rollout_server.engine.protocol import GenerateRequest, GenerateResult
from rollout_server.router.circuit_breaker import BreakerLimits
from rollout_server.router.router import RoutedResult, Router
from shared.errors import EngineError, InvalidRequestError
from shared.pool_types import CircuitState
from shared.types import EngineState, FinishReason
from tests.fakes.engine import FakeEngine
from tests.fakes.routers import blocked, group, router_over, spawn
from tests.fakes.service import until

LIMITS = BreakerLimits(num_failures=2, open_s=10.0, max_open_s=60.0)
CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def failing(engine_id: str = "a") -> FakeEngine:
    return FakeEngine(engine_id, fail_with=EngineError("bad step"))


async def fail(router: Router, *names: str) -> None:
    for name in names:
        with pytest.raises(EngineError, match="bad step"):
            await router.generate(group(name))


async def probing(router: Router, engine: FakeEngine, clock: Clock) -> asyncio.Task[RoutedResult]:
    """Ten seconds on: the engine, which is well now, has group "p" and does not finish it."""
    engine.fail_with = None
    engine.unblocked.clear()
    clock.now_s = 10.0
    (probe,) = spawn(router, group("p"))
    await until(lambda: engine.num_running == 1, "the engine to have it")
    return probe


async def test_an_engine_that_fails_its_groups_gets_none_while_another_serves() -> None:
    engines = [failing(), FakeEngine("b")]
    async with router_over(engines, breaker=LIMITS) as (router, _):
        await fail(router, "g0", "g1")
        for index in range(6):
            routed = await router.generate(group(f"h{index}"))
            assert routed.result.engine_id == "b"
        assert router.circuits.state("a") is OPEN
        assert router.circuits.num_openings == 1
    assert len(engines[0].requests) == 2


async def test_groups_wait_for_room_elsewhere_rather_than_go_to_it() -> None:
    engines = [failing(), blocked("b")]
    async with router_over(engines, room=1, breaker=LIMITS) as (router, _):
        await fail(router, "g0", "g1")
        tasks = spawn(router, group("h0"), group("h1"))
        await until(lambda: router.num_queued_samples == 1, "the second group to queue")
        engines[1].unblocked.set()
        results = await asyncio.gather(*tasks)
    assert {routed.result.engine_id for routed in results} == {"b"}


async def test_without_a_breaker_it_goes_on_getting_them() -> None:
    engines = [failing(), FakeEngine("b")]
    async with router_over(engines) as (router, _):
        await fail(router, "g0", "g1", "g2", "g3")
        assert router.circuits.state("a") is CLOSED


async def test_after_its_time_one_group_tries_it_and_its_success_closes_the_circuit() -> None:
    clock, engines = Clock(), [failing(), FakeEngine("b")]
    async with router_over(engines, breaker=LIMITS, clock=clock) as (router, _):
        await fail(router, "g0", "g1")
        engines[0].fail_with = None
        engines[0].unblocked.clear()
        clock.now_s = 10.0
        (probe, *others) = spawn(router, group("p"), group("h0"), group("h1"))
        await asyncio.gather(*others)
        assert len(engines[0].requests) == 3, "the probe alone"
        assert router.circuits.state("a") is HALF_OPEN
        engines[0].unblocked.set()
        assert (await probe).result.engine_id == "a"
        assert router.circuits.state("a") is CLOSED
        assert (await router.generate(group("i"))).result.engine_id == "a"


async def test_a_probe_that_fails_costs_its_group_nothing_but_time() -> None:
    clock, engines = Clock(), [failing(), FakeEngine("b")]
    async with router_over(engines, breaker=LIMITS, clock=clock) as (router, _):
        await fail(router, "g0", "g1")
        clock.now_s = 10.0
        routed = await router.generate(group("p", n=2))
        assert routed.result.engine_id == "b"
        assert (routed.num_attempts, len(routed.result.samples)) == (2, 2)
        assert router.num_retries == 1
        clock.now_s = 29.9
        assert router.circuits.state("a") is OPEN, "twice as long"
        assert router.num_reserved("a") == router.num_reserved("b") == 0


async def test_with_every_circuit_open_the_one_that_failed_longest_ago_is_tried() -> None:
    clock, engines = Clock(), [failing("a"), failing("b")]
    async with router_over(engines, breaker=LIMITS, clock=clock) as (router, _):
        for index in range(4):
            clock.now_s += 1
            await fail(router, f"g{index}")
        assert [len(engine.requests) for engine in engines] == [2, 2]
        for index in range(4):
            clock.now_s += 0.1
            await fail(router, f"h{index}")
        assert [len(engine.requests) for engine in engines] == [4, 4], "in turn"
        engines[0].fail_with = None
        clock.now_s += 0.1
        assert (await router.generate(group("i"))).result.engine_id == "a"
        assert router.circuits.state("a") is CLOSED
        assert router.circuits.state("b") is OPEN


async def test_an_only_engine_is_tried_at_once_whatever_it_has_failed() -> None:
    engine = failing()
    async with router_over([engine], breaker=LIMITS) as (router, _):
        await fail(router, "g0", "g1", "g2", "g3")
        assert len(engine.requests) == 4, "each once: there is no other to try"
        engine.fail_with = None
        await router.generate(group("h"))
        assert router.circuits.state("a") is CLOSED


async def test_what_an_engine_fails_while_it_is_drained_does_not_count() -> None:
    engine = blocked("a")
    limits = BreakerLimits(num_failures=1, open_s=10.0, max_open_s=60.0)
    async with router_over([engine, FakeEngine("b")], breaker=limits) as (router, _):
        (task,) = spawn(router, group("g"))
        await until(lambda: engine.num_running == 1, "the engine to have it")
        engine.state = EngineState.DRAINING
        engine.fail_with = EngineError("it was stopped")
        engine.unblocked.set()
        with pytest.raises(EngineError):
            await task
        assert router.circuits.state("a") is CLOSED


class Refusing(FakeEngine):
    """As vLLM refuses what our own checks do not know."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        raise InvalidRequestError("no such token")


async def test_a_request_that_is_at_fault_itself_does_not_count() -> None:
    limits = BreakerLimits(num_failures=1, open_s=10.0, max_open_s=60.0)
    async with router_over([Refusing("a")], breaker=limits) as (router, _):
        with pytest.raises(InvalidRequestError):
            await router.generate(group("g"))
        assert router.circuits.state("a") is CLOSED


async def test_a_probe_that_its_client_aborts_leaves_its_place_to_the_next() -> None:
    clock, engines = Clock(), [failing(), FakeEngine("b")]
    async with router_over(engines, breaker=LIMITS, clock=clock) as (router, _):
        await fail(router, "g0", "g1")
        probe = await probing(router, engines[0], clock)
        await router.abort("p")
        (sample,) = (await probe).result.samples
        assert sample.finish_reason is FinishReason.ABORT
        assert router.circuits.state("a") is HALF_OPEN
        engines[0].unblocked.set()
        assert (await router.generate(group("q"))).result.engine_id == "a"


async def test_tokens_of_a_long_probe_let_the_others_in() -> None:
    clock, engines = Clock(), [failing(), FakeEngine("b")]
    async with router_over(engines, breaker=LIMITS, clock=clock) as (router, _):
        await fail(router, "g0", "g1")
        probe = await probing(router, engines[0], clock)
        await until(lambda: engines[0].num_progress_asked > 1, "several looks at it")
        assert router.circuits.state("a") is HALF_OPEN, "it has none"
        engines[0].num_partial_tokens = 2
        await until(lambda: router.circuits.state("a") is CLOSED, "the circuit to close")
        engines[0].unblocked.set()
        await probe


async def test_tokens_of_a_probe_that_could_not_go_on_elsewhere_let_the_others_in_too() -> None:
    clock, engines = Clock(), [failing(), FakeEngine("b")]
    router_of = partial(router_over, may_continue=False, breaker=LIMITS, clock=clock)
    async with router_of(engines) as (router, _):
        await fail(router, "g0", "g1")
        engines[0].num_partial_tokens = 2
        probe = await probing(router, engines[0], clock)
        await until(lambda: router.circuits.state("a") is CLOSED, "the circuit to close")
        engines[0].unblocked.set()
        await probe


async def test_a_probe_that_fails_while_its_engine_is_paused_does_not_close_the_circuit() -> None:
    clock, engines = Clock(), [failing(), FakeEngine("b")]
    async with router_over(engines, breaker=LIMITS, clock=clock) as (router, _):
        await fail(router, "g0", "g1")
        probe = await probing(router, engines[0], clock)
        engines[0].state, engines[0].fail_with = EngineState.PAUSED, EngineError("bad step")
        engines[0].unblocked.set()
        assert (await probe).result.engine_id == "b"
        assert router.circuits.state("a") is HALF_OPEN


async def test_streams_count_as_groups_do() -> None:
    clock, engines = Clock(), [failing(), FakeEngine("b")]
    async with router_over(engines, breaker=LIMITS, clock=clock) as (router, _):
        for name in ("g0", "g1"):
            with pytest.raises(EngineError, match="bad step"):
                [delta async for delta in router.generate_stream(group(name))]
        deltas = [delta async for delta in router.generate_stream(group("h"))]
        assert {delta.engine_id for delta in deltas} == {"b"}
        engines[0].fail_with = None
        clock.now_s = 10.0
        stream = router.generate_stream(group("p"))
        assert (await anext(stream)).engine_id == "a"
        assert router.circuits.state("a") is CLOSED, "it has a token"
        await stream.aclose()


async def test_an_engine_that_is_gone_is_forgotten() -> None:
    engines = [failing(), FakeEngine("b")]
    async with router_over(engines, breaker=LIMITS) as (router, pool):
        await fail(router, "g0", "g1")
        pool.members.remove(engines[0])
        await router.generate(group("h"))
        assert router.circuits.state("a") is CLOSED
