"""Live changes of the speculation policy."""

from __future__ import annotations

import pytest

from rollout_server.live_speculation import LiveSpeculation, initial_policy, patched_policy
from shared.config.speculation import SpeculationConfig
from shared.errors import EngineDeadError, EngineError, InvalidRequestError
from shared.schemas.speculation import SpeculationPatch
from shared.types import EngineState, SpeculationMode
from tests.fakes.engine import FakeEngine
from tests.fakes.pool import FakePool

POLICY = initial_policy(SpeculationConfig())


def test_a_patch_changes_what_it_names_and_leaves_the_rest() -> None:
    new = patched_policy(POLICY, SpeculationPatch(kv_cache_threshold=0.75), 4)
    assert new == POLICY.model_copy(update={"kv_cache_threshold": 0.75})


@pytest.mark.parametrize(
    ("patch", "limit", "param", "message"),
    [
        ({"num_speculative_tokens": 5}, 4, "num_speculative_tokens", "5 is above the limit of 4"),
        ({"kv_cache_hysteresis": 0.6}, 4, "kv_cache_hysteresis", "0.6 is above .* 0.5"),
        ({"kv_cache_threshold": 0.01}, 4, "kv_cache_threshold", "0.05 is above .* 0.01"),
        ({"min_dwell_steps": 1}, 0, "mode", "needs a drafter"),
    ],
)
def test_an_impossible_patch_names_field_value_and_limit(
    patch: dict[str, object], limit: int, param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        patched_policy(POLICY, SpeculationPatch.model_validate(patch), limit)
    assert caught.value.param == param


def test_without_a_drafter_speculation_can_be_switched_off() -> None:
    off = patched_policy(POLICY, SpeculationPatch(mode=SpeculationMode.OFF), 0)
    assert off.mode is SpeculationMode.OFF


async def test_a_patch_reaches_every_engine_whole_and_is_kept_for_joiners() -> None:
    engines = [FakeEngine("a"), FakeEngine("b"), FakeEngine("c", state=EngineState.STARTING)]
    live = LiveSpeculation(FakePool(engines), SpeculationConfig())
    await live.patch(SpeculationPatch(num_speculative_tokens=2))
    assert live.policy.num_speculative_tokens == 2
    for engine in engines[:2]:
        assert engine.patches == [SpeculationPatch.model_validate(live.policy.model_dump())]
    assert engines[2].patches == []


async def test_a_joiner_gets_the_policy_and_no_later_patch_passes_it_by() -> None:
    joiner = FakeEngine("a", state=EngineState.STARTING)
    live = LiveSpeculation(FakePool([joiner]), SpeculationConfig())
    await live.apply_to(joiner)
    await live.patch(SpeculationPatch(num_speculative_tokens=2))
    assert [patch.num_speculative_tokens for patch in joiner.patches] == [4, 2]


async def test_a_refused_patch_touches_no_engine() -> None:
    engine = FakeEngine("a")
    live = LiveSpeculation(FakePool([engine]), SpeculationConfig())
    with pytest.raises(InvalidRequestError):
        await live.patch(SpeculationPatch(num_speculative_tokens=9))
    assert engine.patches == []
    assert live.policy == POLICY


async def test_a_dying_engine_does_not_fail_a_patch_but_a_living_one_does() -> None:
    dying = FakeEngine("a", fail_with=EngineDeadError("gone"))
    living = FakeEngine("b")
    live = LiveSpeculation(FakePool([dying, living]), SpeculationConfig())
    await live.patch(SpeculationPatch(mode=SpeculationMode.OFF))
    assert len(living.patches) == 1
    living.fail_with = EngineError("busy")
    with pytest.raises(EngineError, match="busy"):
        await live.patch(SpeculationPatch(mode=SpeculationMode.ALWAYS))


async def test_a_report_without_one_engine_is_better_than_none() -> None:
    engines = [FakeEngine("a", fail_with=EngineError("busy")), FakeEngine("b")]
    live = LiveSpeculation(FakePool(engines), SpeculationConfig())
    report = await live.read(since_step=3, history=2)
    assert [engine.engine_id for engine in report.engines] == ["b"]
    assert [step.step for step in report.engines[0].history] == [9, 10]
    everything = await live.read(since_step=3)
    assert [step.step for step in everything.engines[0].history] == [4, 5, 6, 7, 8, 9, 10]
    assert (await live.read(history=0)).engines[0].history == []
