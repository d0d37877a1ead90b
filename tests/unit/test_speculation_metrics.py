"""The engines' speculation as Prometheus sees it."""

from __future__ import annotations

from rollout_server.speculation.policy import initial_policy
from rollout_server.speculation_metrics import speculation_metrics
from shared import metrics as names
from shared.config.speculation import SpeculationConfig
from shared.schemas.speculation import EngineSpeculation, SpeculationPolicy
from shared.types import SpeculationMode
from tests.fakes.engine import FakeEngine

POLICY = initial_policy(SpeculationConfig())


def samples(
    reports: list[EngineSpeculation], **modes: SpeculationMode
) -> dict[tuple[str, ...], float]:
    """Values by sample name and label values, in order of the labels' names."""

    def policy_of(engine_id: str) -> SpeculationPolicy:
        return POLICY.model_copy(update={"mode": modes.get(engine_id, POLICY.mode)})

    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in speculation_metrics(reports, policy_of)
        for sample in family.samples
    }


async def test_steps_and_seconds_are_counted_by_draft_length_and_steps_by_reason() -> None:
    found = samples([await FakeEngine("a").speculation(0)])
    assert found[names.ENGINE_STEPS, "a", "4"] == 8
    assert found[names.ENGINE_STEP_SECONDS, "a", "0"] == 0.5
    assert found[names.ENGINE_STEPS_BY_REASON, "a", "above_threshold"] == 2
    assert found[names.ENGINE_REALISED_SECONDS, "a"] == 1.9
    assert found[names.ENGINE_PREDICTED_SECONDS, "a"] == 1.8
    assert found[names.ENGINE_STEP_TIME_ERROR, "a"] == 0.05


async def test_positions_count_from_one_and_the_cost_model_is_named() -> None:
    found = samples([await FakeEngine("a").speculation(0)])
    assert found[names.ENGINE_ACCEPTANCE, "a", "1"] == 0.9
    assert (names.ENGINE_ACCEPTANCE, "a", "0") not in found
    assert found[names.ENGINE_COST_MODEL, "a", "self"] == 1
    assert found[names.ENGINE_MACHINE_FACTOR, "a"] == 1.25


async def test_each_engine_shows_the_mode_it_follows() -> None:
    reports = [await FakeEngine(name).speculation(0) for name in ("a", "b")]
    found = samples(reports, b=SpeculationMode.OFF)
    assert found[names.ENGINE_SPECULATION_MODE, "a", "adaptive"] == 1
    assert found[names.ENGINE_SPECULATION_MODE, "b", "adaptive"] == 0
    assert found[names.ENGINE_SPECULATION_MODE, "b", "off"] == 1


async def test_kv_usage_at_decisions_is_a_cumulative_histogram() -> None:
    found = samples([await FakeEngine("a").speculation(0)])
    name = names.ENGINE_DECISION_KV_CACHE_USAGE
    edges = ("0.1", "0.2", "0.3", "0.9", "1", "+Inf")
    assert [found[f"{name}_bucket", "a", edge] for edge in edges] == [0, 3, 8, 8, 10, 10]
    assert (found[f"{name}_count", "a"], found[f"{name}_sum", "a"]) == (10, 3.5)


async def test_what_an_engine_cannot_tell_is_left_out() -> None:
    report = (await FakeEngine("a").speculation(0)).model_copy(
        update={"median_step_time_error": None, "num_steps_per_kv_usage": [], "cost_model": ""}
    )
    found = {name for name, *_ in samples([report])}
    for name in (names.ENGINE_STEP_TIME_ERROR, names.ENGINE_COST_MODEL):
        assert name not in found
    assert not any(name.startswith(names.ENGINE_DECISION_KV_CACHE_USAGE) for name in found)


def test_without_engines_there_is_nothing_to_count() -> None:
    assert samples([]) == {}
