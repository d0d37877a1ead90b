"""What the choice does with given rates, case by case; over time: test_speculation_choice_sim."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rollout_server.speculation.acceptance import AcceptanceTracker
from rollout_server.speculation.correction import StepTimeCorrection
from rollout_server.speculation.cost_model import CostModel, PiecewiseLinear
from rollout_server.speculation.draft_length import ChoiceSettings, DraftLengthChoice
from rollout_server.speculation.steps import EngineLoadSample
from shared.types import SpeculationReason

# No trials: what is looked at is the choice alone.
SETTINGS = ChoiceSettings(
    max_draft_length=1, min_speedup=1.1, switch_margin=0.2, exploration_fraction=0.0
)
PRIOR_LENGTH = 1.8
"""Tokens of a cycle with one draft, as nobody has tried one yet."""


def choice_of(speedups: dict[int, float]) -> DraftLengthChoice:
    """One draft at so many sequences is so much faster than none."""
    counts = sorted(speedups)
    drafts = [PRIOR_LENGTH / speedups[count] - 1 for count in counts]
    model = CostModel(
        target=PiecewiseLinear(knots=(1, 1000), values_s=(1.0, 1.0)),
        draft=PiecewiseLinear(knots=tuple(counts), values_s=tuple(drafts)),
    )
    return DraftLengthChoice(StepTimeCorrection(model), AcceptanceTracker(1))


def sample(num_reqs: int) -> EngineLoadSample:
    return EngineLoadSample(
        time_s=0.0,
        kv_cache_usage=0.1,
        num_running_reqs=num_reqs,
        num_waiting_reqs=0,
        num_decode_reqs=num_reqs,
    )


@pytest.mark.parametrize(
    ("speedup_first", "speedup_then", "first", "then"),
    [
        (1.3, 1.2, 1, 1),  # stays on while it is faster
        (1.09, 1.09, 0, 0),  # does not begin below min_speedup
        (1.3, 1.02, 1, 1),  # goes on below min_speedup: there is nothing to gain by stopping
        (1.3, 0.95, 1, 0),  # plain decoding is gone back to without the switch margin
        (1.3, 0.5, 1, 0),
    ],
)
def test_on_needs_a_promise_off_needs_none(
    speedup_first: float, speedup_then: float, first: int, then: int
) -> None:
    choice = choice_of({1: speedup_first, 8: min(speedup_then, speedup_first)})
    decided = [choice.choose(sample(num_reqs), SETTINGS) for num_reqs in (1, 8)]
    assert [d.num_speculative_tokens for d in decided] == [first, then]
    assert decided[0].predicted_speedup == pytest.approx(speedup_first if first else 1.0)
    reasons = (SpeculationReason.PREDICTED_SLOWER, SpeculationReason.PREDICTED_FASTER)
    assert [d.reason for d in decided] == [reasons[first], reasons[then]]


def test_a_reserved_length_is_never_exceeded() -> None:
    choice = choice_of({1: 1.5, 8: 1.4})
    settings = replace(SETTINGS, max_draft_length=1)
    assert choice.choose(sample(1), settings).num_speculative_tokens == 1
    crowded = replace(sample(1), max_draft_tokens=0)
    assert choice.choose(crowded, settings).num_speculative_tokens == 0
