"""Groups whose engines die in the middle, over fake engines."""

from __future__ import annotations

import asyncio

from shared.types import FinishReason
from tests.fakes.engine import FakeEngine, fake_tokens
from tests.fakes.routers import blocked, group, router_over, spawn
from tests.fakes.service import until


def dying_in_the_middle(num_partial_tokens: int, num_finished: int = 0) -> FakeEngine:
    engine = blocked("a")
    engine.num_partial_tokens, engine.num_finished = num_partial_tokens, num_finished
    return engine


async def test_another_engine_goes_on_behind_the_tokens_of_one_that_died() -> None:
    engines = [dying_in_the_middle(2, num_finished=1), FakeEngine("b")]
    async with router_over(engines) as (router, _):
        (task,) = spawn(router, group("g", n=3))
        await until(lambda: engines[0].num_progress_asked >= 2, "its progress to be known")
        engines[0].die()
        routed = await task
        assert router.num_kept_tokens == 6 + 2 * 2
        assert router.num_reserved("a") == router.num_reserved("b") == 0
    rests = engines[1].requests
    assert [rest.request_id for rest in rests] == [f"g/attempt=2/sample={i}" for i in (1, 2)]
    first = [fake_tokens([1, 2], index, 256)[:2] for index in range(3)]
    assert [rest.prompt_token_ids for rest in rests] == [[1, 2, *first[1]], [1, 2, *first[2]]]
    samples = routed.result.samples
    assert samples[0].token_ids == fake_tokens([1, 2], 0, 256)
    assert samples[1].token_ids[:2] == first[1]
    assert samples[1].token_ids[2:] == fake_tokens([1, 2, *first[1]], 0, 254)
    assert engines[1].max_running == 2


async def test_by_configuration_a_dead_engines_tokens_are_not_asked_for() -> None:
    engines = [dying_in_the_middle(2), FakeEngine("b")]
    async with router_over(engines, may_continue=False) as (router, _):
        (task,) = spawn(router, group("g"))
        await until(lambda: engines[0].num_running == 1, "the engine to have it")
        await asyncio.sleep(0.05)
        engines[0].die()
        assert (await task).result.samples[0].token_ids == fake_tokens([1, 2], 0, 256)
    assert engines[0].num_progress_asked == 0


async def test_a_group_that_had_finished_needs_no_other_engine() -> None:
    engine = dying_in_the_middle(0, num_finished=2)
    async with router_over([engine]) as (router, _):
        (task,) = spawn(router, group("g", n=2))
        await until(lambda: engine.num_progress_asked >= 2, "its progress to be known")
        engine.die()
        routed = await task
    assert [len(sample.token_ids) for sample in routed.result.samples] == [6, 6]


async def test_an_abort_reaches_every_piece_of_a_continued_group() -> None:
    engines = [dying_in_the_middle(2), blocked("b")]
    async with router_over(engines) as (router, _):
        (task,) = spawn(router, group("g", n=2))
        await until(lambda: engines[0].num_progress_asked >= 2, "its progress to be known")
        engines[0].die()
        await until(lambda: engines[1].num_running == 2, "the other engine to have both")
        await router.abort("g")
        samples = (await task).result.samples
    # A set: one that goes on is told again by the next question for its progress.
    assert set(engines[1].aborted) == {"g/attempt=2/sample=0", "g/attempt=2/sample=1"}
    assert {sample.finish_reason for sample in samples} == {FinishReason.ABORT}
    assert all(len(sample.token_ids) > 2 for sample in samples)
