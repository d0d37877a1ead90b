"""The cost model predicts what it was fitted to, and never falls where work grows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollout_server.speculation.calibration_fit import MeasuredStep, fit_cost_model
from rollout_server.speculation.cost_model import (
    CostModel,
    PiecewiseLinear,
    conservative_model,
)
from rollout_server.speculation.steps import StepShape

TRUTH = CostModel(
    target=PiecewiseLinear(knots=(1, 8, 64, 128), values_s=(0.030, 0.032, 0.080, 0.150)),
    draft=PiecewiseLinear(knots=(1, 32), values_s=(0.012, 0.030)),
    kv_read_s=4e-7,
    kv_query_s=1e-7,
    verify_step_s=0.008,
    verify_row_s=0.0002,
    draft_kv_s=3e-7,
)


def measured(noise: float, seed: int = 0) -> list[MeasuredStep]:
    generator = random.Random(seed)
    return [
        MeasuredStep(
            shape=(shape := StepShape.steady(num_reqs, num_reqs * context, k)),
            duration_s=TRUTH.step_s(shape) * generator.uniform(1 - noise, 1 + noise),
        )
        for num_reqs in (1, 2, 3, 4, 6, 8, 12, 16, 24)
        for context in (50, 800)
        for k in range(5)
    ]


def test_a_fit_explains_the_steps_it_was_fitted_to() -> None:
    model, quality = fit_cost_model(measured(noise=0.0))
    assert quality.median_relative_error < 0.01
    assert model.verify_step_s == pytest.approx(0.008, rel=0.2)
    for num_reqs, context, k in [(5, 300, 2), (10, 600, 1), (20, 100, 3)]:
        shape = StepShape.steady(num_reqs, num_reqs * context, k)
        assert model.step_s(shape) == pytest.approx(TRUTH.step_s(shape), rel=0.05)


def test_a_fit_to_noisy_steps_stays_near_the_truth() -> None:
    model, quality = fit_cost_model(measured(noise=0.08))
    assert quality.median_relative_error < 0.06
    for num_reqs in (1, 4, 16):
        for k in (0, 2, 4):
            shape = StepShape.steady(num_reqs, num_reqs * 200, k)
            assert model.step_s(shape) == pytest.approx(TRUTH.step_s(shape), rel=0.08)


def test_one_draft_length_cannot_be_fitted() -> None:
    only_plain = [step for step in measured(0.0) if step.shape.num_speculative_tokens == 0]
    with pytest.raises(ValueError, match="fewer than two draft lengths"):
        fit_cost_model(only_plain)


def test_steady_step_is_the_step_of_the_steady_shape() -> None:
    for model in (TRUTH, conservative_model()):
        for num_reqs, tokens, k in [(1, 10, 0), (1, 10, 3), (17, 9000, 2), (600, 100_000, 4)]:
            expected = model.step_s(StepShape.steady(num_reqs, tokens, k))
            assert model.steady_step_s(num_reqs, tokens, k) == pytest.approx(expected)


@given(
    num_reqs=st.integers(1, 400),
    tokens=st.integers(0, 200_000),
    k=st.integers(0, 8),
    noise=st.floats(0, 0.3),
    seed=st.integers(0, 50),
)
def test_more_work_never_takes_less_time(
    num_reqs: int, tokens: int, k: int, noise: float, seed: int
) -> None:
    model, _ = fit_cost_model(measured(noise, seed))
    base = model.steady_step_s(num_reqs, tokens, k)
    slack = 1 - 1e-9
    assert model.steady_step_s(num_reqs + 1, tokens, k) >= base * slack
    assert model.steady_step_s(num_reqs, tokens + 1000, k) >= base * slack
    assert model.steady_step_s(num_reqs, tokens, k + 1) >= base * slack


def test_ratios_are_those_of_a_draft_and_a_verification_pass() -> None:
    c, v = TRUTH.ratios(1, 0, 2)
    assert c == pytest.approx(0.012 / 0.030)
    verify = TRUTH.target(3) + 0.008 + 2 * 0.0002
    assert v == pytest.approx(verify / 0.030)


def test_a_falling_or_crooked_table_is_refused() -> None:
    with pytest.raises(ValidationError, match="fall"):
        PiecewiseLinear(knots=(1, 2), values_s=(2.0, 1.0))
    with pytest.raises(ValidationError, match="do not rise"):
        PiecewiseLinear(knots=(2, 2), values_s=(1.0, 1.0))


def test_the_conservative_rule_drafts_for_few_sequences_only() -> None:
    model = conservative_model()

    def speedup(num_reqs: int, acceptance: float) -> float:
        plain = model.steady_step_s(num_reqs, 0, 0)
        return (1 + acceptance) * plain / model.steady_step_s(num_reqs, 0, 1)

    assert speedup(1, 0.9) > 1.15
    assert speedup(8, 0.95) < 1.0
