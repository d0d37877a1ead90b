"""The clock of steps, the correction by what they took, and the room for drafts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.speculation.correction import StepTimeCorrection
from rollout_server.speculation.cost_model import CostModel, PiecewiseLinear, conservative_model
from rollout_server.speculation.room import draft_room, useful_draft_length
from rollout_server.speculation.step_clock import StepClock
from rollout_server.speculation.steps import StepShape

MODEL = CostModel(
    target=PiecewiseLinear(knots=(1, 64), values_s=(0.03, 0.06)),
    draft=PiecewiseLinear(knots=(1, 64), values_s=(0.01, 0.02)),
)
PLAIN = StepShape.steady(4, 100, 0)
DRAFTING = StepShape.steady(4, 100, 3)


def test_a_step_takes_from_the_end_of_the_one_before_to_its_own_end() -> None:
    clock = StepClock()
    clock.begin(PLAIN, 10.0)
    assert clock.finish(10.5) == (PLAIN, 0.5)
    clock.begin(DRAFTING, 10.501)  # bookkeeping between two steps is the next one's
    finished = clock.finish(11.0)
    assert finished is not None
    assert finished[1] == pytest.approx(0.5)


def test_an_idle_engine_is_not_timed() -> None:
    clock = StepClock()
    clock.begin(PLAIN, 10.0)
    clock.finish(10.5)
    clock.begin(PLAIN, 99.0)
    assert clock.finish(99.4) == (PLAIN, pytest.approx(0.4))


def test_steps_scheduled_ahead_are_timed_from_the_end_of_the_one_before() -> None:
    clock = StepClock()
    clock.begin(PLAIN, 0.0)
    clock.begin(DRAFTING, 0.1)
    assert clock.finish(1.0) == (PLAIN, 1.0)
    assert clock.finish(1.7) == (DRAFTING, pytest.approx(0.7))


def test_a_step_that_computed_nothing_is_no_step() -> None:
    clock = StepClock()
    clock.begin(None, 0.0)
    assert clock.finish(0.1) is None


def test_a_machine_that_slows_down_changes_no_comparison() -> None:
    correction = StepTimeCorrection(MODEL)
    for step in range(200):
        shape = PLAIN if step % 2 else DRAFTING
        slow = 2.0 if step >= 100 else 1.0
        correction.observe(shape, slow * MODEL.step_s(shape), step * 0.05)
    assert correction.machine_factor == pytest.approx(2.0, rel=0.1)
    for k in (0, 3):
        assert correction.log_residual(4, k, 10.0) == pytest.approx(0.0, abs=0.12)
    assert correction.predicted_step_s(DRAFTING, 10.0) == pytest.approx(
        2 * MODEL.step_s(DRAFTING), rel=0.1
    )


def test_what_the_model_gets_wrong_about_one_draft_length_is_learned() -> None:
    correction = StepTimeCorrection(MODEL)
    for step in range(600):
        shape = PLAIN if step % 2 else DRAFTING
        factor = 1.5 if shape is DRAFTING else 1.0
        correction.observe(shape, factor * MODEL.step_s(shape), step * 0.05)
    now = 30.0
    for num_reqs in (4, 16):
        learned = correction.log_correction(num_reqs, 3, now)
        learned -= correction.log_correction(num_reqs, 0, now)
        assert learned == pytest.approx(0.405, abs=0.12), "a slow part is slow at any batch size"


def test_one_stalled_step_moves_nothing_far() -> None:
    correction = StepTimeCorrection(MODEL)
    for step in range(50):
        correction.observe(PLAIN, MODEL.step_s(PLAIN), step * 0.05)
    correction.observe(PLAIN, 100.0, 2.5)
    assert correction.machine_factor < 1.05
    assert abs(correction.log_residual(4, 0, 2.5)) < 0.05


def test_what_the_parts_cannot_explain_is_learned_for_its_load_and_forgotten() -> None:
    correction = StepTimeCorrection(MODEL)
    small = StepShape.steady(4, 100, 3)
    large = StepShape.steady(32, 800, 3)
    for step in range(1200):
        # Drafting is slow at one batch size and quick at the other: no part is to blame.
        shape = (StepShape.steady(4, 100, 0), small, StepShape.steady(32, 800, 0), large)[step % 4]
        factor = {small: 1.3, large: 1 / 1.3}.get(shape, 1.0)
        correction.observe(shape, MODEL.step_s(shape) * factor, 0.0)
    assert correction.log_correction(4, 3, 0.0) - correction.log_correction(32, 3, 0.0) > 0.3
    for num_reqs in (4, 32):
        assert abs(correction.log_residual(num_reqs, 3, 1200.0)) < 0.01


def test_what_plain_steps_of_another_batch_size_take_is_blamed_on_no_other_part() -> None:
    """Of four drafts a step only: what they cost and how fast the machine is cannot be told yet."""
    correction = StepTimeCorrection(conservative_model())
    for step in range(100):
        correction.observe(StepShape.steady(1, 500, 4), 0.12, step * 0.1)
    before = correction.log_correction(24, 4, 10.0)
    for step in range(4):
        correction.observe(StepShape.steady(24, 12_000, 0), 0.18, 10.0 + step * 0.2)
    assert correction.log_correction(24, 4, 11.0) == pytest.approx(before, abs=0.35)


def test_noise_does_not_drift() -> None:
    generator = random.Random(0)
    correction = StepTimeCorrection(MODEL)
    for step in range(2000):
        shape = (PLAIN, DRAFTING)[step // 20 % 2]
        noise = generator.lognormvariate(0.0, 0.1)
        correction.observe(shape, MODEL.step_s(shape) * noise, step * 0.05)
    difference = correction.log_correction(4, 3, 100.0) - correction.log_correction(4, 0, 100.0)
    assert abs(difference) < 0.06


@given(
    free=st.integers(0, 200),
    block_size=st.sampled_from([1, 8, 16, 32, 128]),
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=20),
    k=st.integers(1, 8),
)
def test_with_room_nobody_runs_out_of_blocks_before_drafted_slots_are_used(
    free: int, block_size: int, lengths: list[int], k: int
) -> None:
    """Hold slots for two steps' drafts, then grow plainly by as many tokens: blocks suffice."""
    room = draft_room(
        k,
        num_free_blocks=free,
        block_size=block_size,
        num_running_reqs=len(lengths),
        num_waiting_tokens=0,
    )
    if room == 0:
        return
    held = [-(-length // block_size) for length in lengths]
    reserved = [-(-(length + 1 + 2 * k) // block_size) for length in lengths]
    grown = [-(-(length + 1 + 2 * k) // block_size) for length in lengths]
    needed = sum(max(r, g) - h for h, r, g in zip(held, reserved, grown, strict=True))
    assert needed <= free


def test_a_waiting_request_is_counted() -> None:
    room = draft_room(
        4, num_free_blocks=7, block_size=16, num_running_reqs=2, num_waiting_tokens=100
    )
    assert room == 0
    assert (
        draft_room(4, num_free_blocks=7, block_size=16, num_running_reqs=2, num_waiting_tokens=0)
        == 4
    )


def test_drafts_end_where_the_longest_request_ends() -> None:
    lengths = [useful_draft_length(4, most_left) for most_left in (100, 6, 5, 4, 3, 2, 1)]
    assert lengths == [4, 4, 3, 2, 1, 1, 1]
