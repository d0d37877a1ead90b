"""Live changes of the speculation policy."""

from __future__ import annotations

import pytest

from rollout_server.live_speculation import LiveSpeculation
from rollout_server.speculation.policy import apply_patch, initial_policy, whole_patch
from rollout_server.speculation_changes import patched_policy
from shared.config.speculation import SpeculationConfig
from shared.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    UnknownResourceError,
)
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
        ({"kv_cache_hysteresis": 0.5}, 4, "kv_cache_hysteresis", "0.5 is not below .* 0.5"),
        ({"kv_cache_hysteresis": 0.6}, 4, "kv_cache_hysteresis", "0.6 is not below .* 0.5"),
        ({"kv_cache_threshold": 0.01}, 4, "kv_cache_threshold", "0.05 is not below .* 0.01"),
        ({"min_dwell_steps": 1}, 0, "mode", "needs a drafter"),
        ({"kv_cache_threshold_tokens": 99}, 4, "kv_cache_threshold_tokens", "100 of .* 2000 .* 99"),
    ],
)
def test_an_impossible_patch_names_field_value_and_limit(
    patch: dict[str, object], limit: int, param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        patched_policy(POLICY, SpeculationPatch.model_validate(patch), limit, {"a": 2000})
    assert caught.value.param == param


def test_without_a_drafter_speculation_can_be_switched_off() -> None:
    off = patched_policy(POLICY, SpeculationPatch(mode=SpeculationMode.OFF), 0)
    assert off.mode is SpeculationMode.OFF


def test_a_whole_policy_travels_with_the_one_threshold_that_is_in_force() -> None:
    by_tokens = apply_patch(POLICY, SpeculationPatch(kv_cache_threshold_tokens=1000))
    by_fraction = apply_patch(by_tokens, SpeculationPatch(kv_cache_threshold=0.7))
    for policy in (by_tokens, by_fraction):
        assert apply_patch(POLICY, whole_patch(policy)) == policy


async def test_a_patch_reaches_every_engine_whole_and_is_kept_for_joiners() -> None:
    engines = [FakeEngine("a"), FakeEngine("b"), FakeEngine("c", state=EngineState.STARTING)]
    live = LiveSpeculation(FakePool(engines), SpeculationConfig())
    await live.patch(SpeculationPatch(num_speculative_tokens=2))
    assert live.policy.num_speculative_tokens == 2
    for engine in engines[:2]:
        assert engine.patches == [whole_patch(live.policy)]
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


def modes(engine: FakeEngine) -> list[SpeculationMode | None]:
    return [patch.mode for patch in engine.patches]


async def test_an_engine_keeps_settings_of_its_own_until_the_next_change_for_all() -> None:
    a, b = FakeEngine("a"), FakeEngine("b")
    live = LiveSpeculation(FakePool([a, b]), SpeculationConfig())
    await live.patch(SpeculationPatch(mode=SpeculationMode.OFF), engine_ids=["b"])
    await live.patch(SpeculationPatch(num_speculative_tokens=2), engine_ids=["b"])
    own = POLICY.model_copy(update={"mode": SpeculationMode.OFF, "num_speculative_tokens": 2})
    report = await live.read()
    assert (report.policy, report.overrides) == (POLICY, {"b": own})
    assert a.patches == []
    await live.patch(SpeculationPatch(min_dwell_steps=3))
    assert (await live.read()).overrides == {}
    assert modes(a) == [POLICY.mode]
    assert modes(b) == [SpeculationMode.OFF, SpeculationMode.OFF, POLICY.mode]
    assert b.patches[-1].num_speculative_tokens == POLICY.num_speculative_tokens


async def test_an_engine_that_still_starts_gets_its_own_settings_when_it_joins() -> None:
    joiner, other = FakeEngine("a", state=EngineState.STARTING), FakeEngine("b")
    live = LiveSpeculation(FakePool([joiner, other]), SpeculationConfig())
    await live.patch(SpeculationPatch(mode=SpeculationMode.OFF), engine_ids=["a"])
    assert joiner.patches == []
    await live.apply_to(joiner)
    await live.apply_to(other)
    assert (modes(joiner), modes(other)) == ([SpeculationMode.OFF], [POLICY.mode])


async def test_an_unknown_or_dead_engine_is_named_with_the_known_ones_and_nobody_is_touched() -> (
    None
):
    engines = [FakeEngine("a"), FakeEngine("b"), FakeEngine("dead", state=EngineState.DEAD)]
    live = LiveSpeculation(FakePool(engines), SpeculationConfig())
    for unknown in ("c", "dead"):
        with pytest.raises(UnknownResourceError, match=f"{unknown}; there are: a, b") as caught:
            await live.patch(SpeculationPatch(min_dwell_steps=3), engine_ids=["a", unknown])
        assert caught.value.param == "engine_ids"
    assert [engine.patches for engine in engines] == [[], [], []]
    assert (await live.read()).overrides == {}


async def test_settings_that_are_impossible_for_one_of_the_engines_reach_none() -> None:
    small, large = FakeEngine("small"), FakeEngine("large")
    capacities = {"small": 10_000, "large": 1_000_000}
    live = LiveSpeculation(FakePool([small, large]), SpeculationConfig(), capacities.get)
    with pytest.raises(InvalidRequestError, match=r"of large, not below .* 2000"):
        await live.patch(
            SpeculationPatch(kv_cache_threshold_tokens=2000), engine_ids=["small", "large"]
        )
    assert (small.patches, large.patches) == ([], [])
    await live.patch(SpeculationPatch(kv_cache_threshold_tokens=2000), engine_ids=["small"])
    assert small.patches[0].kv_cache_threshold_tokens == 2000
    assert small.patches[0].kv_cache_threshold is None


async def test_each_change_is_one_line_of_the_log_with_caller_and_old_and_new_values(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "rollout_server.live_speculation")
    live = LiveSpeculation(FakePool([FakeEngine("a"), FakeEngine("b")]), SpeculationConfig())
    off = SpeculationPatch(mode=SpeculationMode.OFF)
    await live.patch(off, engine_ids=["b"], caller="request 7 from 10.0.0.1")
    await live.patch(SpeculationPatch(kv_cache_threshold=0.4), caller="request 8 from 10.0.0.1")
    with pytest.raises(InvalidRequestError):
        await live.patch(SpeculationPatch(num_speculative_tokens=9))
    assert caplog.messages == [
        "speculation changed by request 7 from 10.0.0.1: mode adaptive -> off on b",
        "speculation changed by request 8 from 10.0.0.1: kv_cache_threshold 0.5 -> 0.4 on all "
        "engines (a, b); settings of their own ended: b: mode off -> adaptive, kv_cache_threshold "
        "0.5 -> 0.4",
    ]
