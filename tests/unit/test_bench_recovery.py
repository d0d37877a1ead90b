"""What the robustness benchmark calls a bad choice, and for how long one lasted."""

from __future__ import annotations

from benchmarks.harness.recovery import SETTLING_S, Hindsight, recovery
from rollout_server.speculation.cost_model import CostModel, PiecewiseLinear
from shared.schemas.speculation import SpeculationStep
from shared.types import SpeculationReason

# Free of rows up to 8, then by arithmetic; a draft pass costs 0.3 of a plain step.
MODEL = CostModel(
    target=PiecewiseLinear(knots=(1, 8, 64), values_s=(0.1, 0.1, 0.8)),
    draft=PiecewiseLinear(knots=(1, 8, 64), values_s=(0.03, 0.03, 0.24)),
)
GOOD = Hindsight(cost_model=MODEL, acceptance_per_pos=(0.9, 0.9))
POOR = Hindsight(cost_model=MODEL, acceptance_per_pos=(0.2, 0.2))
EVENT_S = 1000.0
FOREVER_S = float("inf")


def step(
    after_s: float, k: int, num_reqs: int = 1, reason: SpeculationReason | None = None
) -> SpeculationStep:
    return SpeculationStep(
        step=1,
        time_s=EVENT_S + after_s,
        kv_cache_usage=0.1,
        num_running_reqs=num_reqs,
        num_waiting_reqs=0,
        num_speculative_tokens=k,
        reason=reason or SpeculationReason.PREDICTED_FASTER,
    )


def test_a_shortfall_is_what_the_best_draft_length_would_have_made_more() -> None:
    assert GOOD.shortfall(step(0, 2)) == 0
    assert abs(GOOD.shortfall(step(0, 0)) - (2.71 / 1.6 - 1)) < 1e-9
    assert POOR.shortfall(step(0, 0)) == 0
    assert POOR.shortfall(step(0, 2)) > 0.2
    assert GOOD.shortfall(step(0, 2, num_reqs=24)) > 0.05, "rows are not free with many requests"


def test_recovery_ends_with_the_last_bad_choice() -> None:
    steps = [step(-1, 2), step(0.2, 2), step(0.5, 2), step(0.9, 0), step(3.0, 0)]
    found = recovery(steps, EVENT_S, FOREVER_S, POOR)
    assert abs(found.last_bad_s - 0.9) < 1e-9
    assert abs(found.bad_s - 0.7) < 1e-9
    assert abs(found.last_change_s - 0.9) < 1e-9


def test_a_relapse_counts_and_the_time_between_does_not() -> None:
    steps = [step(0.1, 2), step(0.3, 0), step(4.0, 2), step(4.5, 0)]
    found = recovery(steps, EVENT_S, FOREVER_S, POOR)
    assert abs(found.last_bad_s - 4.5) < 1e-9
    assert abs(found.bad_s - 0.7) < 1e-9


def test_a_right_change_while_the_batch_drains_is_none() -> None:
    steps = [step(0.1, 0, num_reqs=24), step(6.0, 2, num_reqs=1)]
    found = recovery(steps, EVENT_S, FOREVER_S, GOOD)
    assert (found.last_bad_s, found.bad_s) == (0, 0)
    assert found.last_change_s == 6.0


def test_trials_and_what_comes_after_the_next_event_are_left_out() -> None:
    trial = step(0.5, 2, reason=SpeculationReason.EXPLORING)
    steps = [step(0.1, 0), trial, step(0.6, 0), step(2.0, 2)]
    found = recovery(steps, EVENT_S, EVENT_S + 1.5, POOR)
    assert (found.last_bad_s, found.bad_s, found.last_change_s) == (0, 0, 0)


def test_a_choice_that_stays_bad_lasts_until_the_end() -> None:
    found = recovery([step(0.1, 2)], EVENT_S, FOREVER_S, POOR)
    assert found.last_bad_s == SETTLING_S
