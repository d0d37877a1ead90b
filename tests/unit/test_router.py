"""Reservation, waiting, retries and aborts of the router, over fake engines."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from rollout_server.router.dispatch_queue import POLL_S, DispatchQueue
from shared.errors import EngineDeadError, EngineError, OverloadedError, UnavailableError
from shared.types import EngineState, FinishReason
from tests.fakes.engine import FakeEngine, fake_tokens
from tests.fakes.pool import FakePool
from tests.fakes.routers import ONE, blocked, group, router_over, spawn
from tests.fakes.service import until


async def test_all_samples_of_a_group_come_from_one_engine() -> None:
    async with router_over([FakeEngine("a"), FakeEngine("b")]) as (router, _):
        routed = await router.generate(group("g", n=3))
    assert [sample.sample_index for sample in routed.result.samples] == [0, 1, 2]
    assert routed.result.samples[1].token_ids == fake_tokens([1, 2], 1, 256)
    assert routed.num_attempts == 1


async def test_turns_of_a_session_go_where_the_last_one_went() -> None:
    engines = [FakeEngine(name) for name in "abc"]
    async with router_over(engines) as (router, _):
        for turn in range(3):
            for session in ("x", "y", "z"):
                request = replace(group(f"{session}{turn}"), session_id=session)
                busy = spawn(router, replace(group(f"other{session}{turn}"), n=1))
                await router.generate(request)
                await asyncio.gather(*busy)
    homes = {
        session: {
            engine.engine_id
            for engine in engines
            for r in engine.requests
            if r.session_id == session
        }
        for session in ("x", "y", "z")
    }
    assert all(len(home) == 1 for home in homes.values())


async def test_groups_spread_over_engines_and_the_rest_waits_in_order() -> None:
    engines = [blocked("a"), blocked("b")]
    async with router_over(engines, room=2) as (router, _):
        tasks = spawn(router, *(group(f"g{i}") for i in range(6)))
        await until(lambda: router.num_queued_samples == 2, "two groups to queue")
        assert [router.num_reserved("a"), router.num_reserved("b")] == [2, 2]
        for engine in engines:
            engine.unblocked.set()
        await asyncio.gather(*tasks)
        assert [router.num_reserved("a"), router.num_reserved("b")] == [0, 0]
    arrivals = [[request.request_id for request in engine.requests] for engine in engines]
    assert sorted(arrivals[0][:2] + arrivals[1][:2]) == ["g0", "g1", "g2", "g3"]


async def test_no_engine_holds_more_than_its_room() -> None:
    engines = [FakeEngine("a", delay_s=0.001), FakeEngine("b", delay_s=0.002)]
    async with router_over(engines, room=4) as (router, _):
        await asyncio.gather(*spawn(router, *(group(f"g{i}", n=3) for i in range(20))))
    assert engines[0].max_running <= 4
    assert engines[1].max_running <= 4


async def test_an_engine_that_joins_late_gets_what_still_waits() -> None:
    first = blocked("a")
    async with router_over([first], room=1) as (router, pool):
        tasks = spawn(router, group("g0"), group("g1"))
        await until(lambda: router.num_queued_samples == 1, "the second group to queue")
        pool.members.append(FakeEngine("b"))
        routed = await asyncio.wait_for(tasks[1], 10)
        assert routed.result.engine_id == "b"
        first.unblocked.set()
        await tasks[0]


async def test_a_group_waits_while_every_engine_starts_and_goes_on_when_one_serves() -> None:
    engine = FakeEngine("a", state=EngineState.STARTING)
    async with router_over([engine]) as (router, _):
        (task,) = spawn(router, group("g"))
        await until(lambda: router.num_queued_samples == 1, "the group to queue")
        assert engine.requests == []
        engine.state = EngineState.SERVING
        await asyncio.wait_for(task, 10)


async def test_a_wait_for_an_engine_ends_with_what_it_waited_for() -> None:
    engine = FakeEngine("a", state=EngineState.STARTING)
    async with router_over([engine], engine_wait_timeout_s=0.01) as (router, _):
        with pytest.raises(UnavailableError, match=r"server.engine_wait_timeout_s.*a starting"):
            await router.generate(group("g"))
        assert router.num_queued_samples == 0


async def test_waiting_for_room_does_not_run_into_the_timeout_for_engines() -> None:
    engine = blocked("a")
    async with router_over([engine], room=1, engine_wait_timeout_s=0.01) as (router, _):
        tasks = spawn(router, group("g0"), group("g1"))
        await until(lambda: router.num_queued_samples == 1, "the second group to queue")
        await asyncio.sleep(0.2)
        engine.unblocked.set()
        await asyncio.gather(*tasks)


async def test_a_group_of_an_engine_that_dies_is_generated_afresh_on_another() -> None:
    engines = [FakeEngine("a", dies_on_generate=True), FakeEngine("b")]
    async with router_over(engines) as (router, _):
        routed = await router.generate(group("g", n=2))
        assert routed.result.engine_id == "b"
        assert routed.num_attempts == 2
        assert router.num_retries == 1
        assert router.num_reserved("a") == 0


async def test_a_dead_engine_gets_nothing_even_if_its_handle_has_not_noticed() -> None:
    liar = FakeEngine("a", fail_with=EngineDeadError("gone"))
    async with router_over([liar, FakeEngine("b")]) as (router, _):
        for index in range(3):
            await router.generate(group(f"g{index}"))
    assert liar.state is EngineState.SERVING
    assert len(liar.requests) == 1


async def test_retries_end_after_max_attempts() -> None:
    engines = [FakeEngine(name, dies_on_generate=True) for name in "abcd"]
    async with router_over(engines, max_attempts=3) as (router, _):
        with pytest.raises(EngineDeadError):
            await router.generate(group("g"))
    assert sum(len(engine.requests) for engine in engines) == 3


async def test_an_engine_error_is_not_retried_and_frees_the_room() -> None:
    failing = FakeEngine("a", fail_with=EngineError("bad step"))
    async with router_over([failing]) as (router, _):
        with pytest.raises(EngineError, match="bad step"):
            await router.generate(group("g"))
        assert router.num_reserved("a") == 0
    assert len(failing.requests) == 1


async def test_an_aborted_group_in_the_queue_comes_back_empty() -> None:
    engine = blocked("a")
    async with router_over([engine], room=1) as (router, _):
        tasks = spawn(router, group("g0"), group("g1", n=2))
        await until(lambda: router.num_queued_samples == 2, "the second group to queue")
        await router.abort("g1")
        samples = (await tasks[1]).result.samples
        assert [sample.finish_reason for sample in samples] == [FinishReason.ABORT] * 2
        assert [sample.token_ids for sample in samples] == [[], []]
        engine.unblocked.set()
        await tasks[0]
    assert [request.request_id for request in engine.requests] == ["g0"]


async def test_an_aborted_group_on_an_engine_comes_back_with_what_there_is() -> None:
    engine = blocked("a")
    async with router_over([engine]) as (router, _):
        (task,) = spawn(router, group("g"))
        await until(lambda: engine.num_running == 1, "the engine to have it")
        await router.abort("g")
        (sample,) = (await task).result.samples
    assert sample.finish_reason is FinishReason.ABORT
    assert sample.token_ids


async def test_cancelling_a_group_aborts_it_on_its_engine_and_frees_the_room() -> None:
    engine = blocked("a")
    async with router_over([engine]) as (router, _):
        (task,) = spawn(router, group("g"))
        await until(lambda: engine.num_running == 1, "the engine to have it")
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert set(engine.aborted) == {"g"}
        assert router.num_reserved("a") == 0


async def test_a_group_cancelled_in_the_moment_it_gets_an_engine_leaks_no_reservation() -> None:
    queue = DispatchQueue(
        FakePool([FakeEngine("a")]), max_samples_per_engine=1, engine_wait_timeout_s=60.0
    )
    await queue.acquire("g0", ONE)
    waiting = asyncio.create_task(queue.acquire("g1", ONE))
    await asyncio.sleep(0)
    queue.release("a", ONE)  # reserves for g1, whose task has not had its turn yet
    assert queue.num_reserved("a") == 1
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert queue.num_reserved("a") == 0


async def test_the_time_without_an_engine_is_forgotten_once_there_is_one() -> None:
    now_s = 0.0
    engine = FakeEngine("a", state=EngineState.STARTING)
    queue = DispatchQueue(
        FakePool([engine]),
        max_samples_per_engine=1,
        engine_wait_timeout_s=10.0,
        clock=lambda: now_s,
    )
    loop_task = asyncio.create_task(queue.run())
    tasks = [asyncio.create_task(queue.acquire(name, ONE)) for name in ("g0", "g1")]
    await until(lambda: queue.num_queued_samples == 2, "both to queue")
    engine.state = EngineState.SERVING
    await tasks[0]
    now_s = 100.0
    await asyncio.sleep(4 * POLL_S)
    assert not tasks[1].done()
    queue.release("a", ONE)
    await tasks[1]
    loop_task.cancel()


async def test_a_stream_moves_to_another_engine_before_its_first_delta_only() -> None:
    engines = [FakeEngine("a", dies_on_generate=True), FakeEngine("b")]
    async with router_over(engines) as (router, pool):
        deltas = [delta async for delta in router.generate_stream(group("g"))]
        assert {delta.engine_id for delta in deltas} == {"b"}
        assert deltas[-1].finish_reason is FinishReason.STOP
        engines[1].dies_after_deltas = 2
        pool.members.append(FakeEngine("c"))
        with pytest.raises(EngineDeadError):
            [delta async for delta in router.generate_stream(group("h"))]
        assert router.num_reserved("b") == 0


async def test_closing_a_stream_early_aborts_it_on_the_engine() -> None:
    engine = FakeEngine("a")
    async with router_over([engine]) as (router, _):
        stream = router.generate_stream(group("g"))
        await anext(stream)
        await stream.aclose()
        assert set(engine.aborted) == {"g"}
        assert router.num_reserved("a") == 0


async def test_closing_the_router_fails_what_waits() -> None:
    async with router_over([]) as (router, _):
        (task,) = spawn(router, group("g"))
        await until(lambda: router.num_queued_samples == 1, "the group to queue")
        await router.close()
        with pytest.raises(UnavailableError, match="shutting down"):
            await task


async def test_pending_samples_are_bounded_and_every_sample_ends_once() -> None:
    async with router_over([]) as (router, _):
        accounts = router.accounts
        accounts.accept(90)
        with pytest.raises(OverloadedError, match=r"90.*max_pending_samples 100") as caught:
            accounts.accept(11)
        assert caught.value.retry_after_s is not None
        accounts.settle(num_delivered=50, num_failed=20, num_cancelled=19)
        accounts.check()
        assert accounts.num_pending == 1
        with pytest.raises(AssertionError, match="settled twice"):
            accounts.settle(num_delivered=2)
        accounts.num_delivered += 1
        with pytest.raises(AssertionError, match="accepted 90"):
            accounts.check()


async def test_an_abort_that_the_engine_did_not_hear_is_repeated() -> None:
    class Deaf(FakeEngine):
        """Forgets the first abort, as of a request that it does not know yet."""

        async def abort(self, request_id: str) -> None:
            self.aborted.append(request_id)
            if len(self.aborted) > 1:
                self._abort_events[request_id].set()

    engine = Deaf("a")
    engine.unblocked.clear()
    async with router_over([engine]) as (router, _):
        (task,) = spawn(router, group("g"))
        await until(lambda: engine.num_running == 1, "the engine to have it")
        await router.abort("g")
        await asyncio.wait_for(task, 10)
    assert len(engine.aborted) > 1
