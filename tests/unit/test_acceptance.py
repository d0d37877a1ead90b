"""Acceptance is learned per position, notices changes, and is carefully forgotten."""

from __future__ import annotations

import random

import pytest

from rollout_server.speculation.acceptance import (
    PRIOR_ACCEPTANCE,
    AcceptanceTracker,
    RequestAcceptance,
    mean_acceptance_lengths,
)


def feed(
    tracker: AcceptanceTracker, acceptance: float, num_drafts: int, *, k: int = 3, seed: int = 0
) -> None:
    generator = random.Random(seed)
    for _ in range(num_drafts):
        accepted = 0
        while accepted < k and generator.random() < acceptance:
            accepted += 1
        tried = [int(position <= accepted) for position in range(k)] + [0]
        hits = [int(position < accepted) for position in range(k)] + [0]
        tracker.observe(tried, hits, time_s=0.0)


def test_before_anything_was_tried_the_prior_holds_at_every_position() -> None:
    assert AcceptanceTracker(3).per_position() == pytest.approx((PRIOR_ACCEPTANCE,) * 3)


def test_acceptance_is_learned_and_positions_never_tried_follow_the_one_before() -> None:
    tracker = AcceptanceTracker(4)
    feed(tracker, 0.6, 600)
    figures = tracker.per_position()
    assert figures[0] == pytest.approx(0.6, abs=0.06)
    assert figures[3] == pytest.approx(figures[2]), "position 4 was never tried"


def test_a_collapse_is_noticed_within_a_few_dozen_drafts() -> None:
    tracker = AcceptanceTracker(4)
    feed(tracker, 0.95, 1000)
    assert tracker.num_changes_noticed == 0
    feed(tracker, 0.3, 80, seed=1)
    assert tracker.num_changes_noticed >= 1
    assert tracker.per_position()[0] < 0.5


def test_chance_alone_is_hardly_ever_taken_for_a_change() -> None:
    tracker = AcceptanceTracker(4)
    feed(tracker, 0.8, 5000)
    assert tracker.num_changes_noticed <= 2


def test_a_push_keeps_the_figures_as_a_first_guess_that_new_drafts_outweigh() -> None:
    tracker = AcceptanceTracker(4)
    feed(tracker, 0.9, 400)
    before = tracker.per_position()[0]
    tracker.weights_changed()
    assert tracker.per_position()[0] == pytest.approx(before, abs=0.06)
    feed(tracker, 0.5, 60, seed=2)
    assert tracker.per_position()[0] < 0.7


def test_after_a_push_a_drafter_that_was_bad_is_hoped_to_be_good_again() -> None:
    tracker = AcceptanceTracker(4)
    feed(tracker, 0.2, 300)
    tracker.weights_changed()
    assert 0.2 < tracker.per_position()[0] < PRIOR_ACCEPTANCE
    assert tracker.optimistic_per_position(0.0)[0] > 0.9


def test_after_a_change_the_evidence_is_that_since_the_change() -> None:
    tracker = AcceptanceTracker(4)
    feed(tracker, 0.95, 1000)
    feed(tracker, 0.3, 15, seed=1)
    assert tracker.num_changes_noticed == 1, "within fifteen drafts"
    assert tracker.per_position()[0] < 0.6
    feed(tracker, 0.95, 40, seed=2)
    assert tracker.num_changes_noticed == 2, "and a recovery too"


def test_hope_grows_as_evidence_ages_and_is_never_above_one() -> None:
    tracker = AcceptanceTracker(4)
    feed(tracker, 0.3, 300)
    soon = tracker.optimistic_per_position(0.0)[0]
    later = tracker.optimistic_per_position(300.0)[0]
    assert tracker.per_position()[0] < soon < later <= 1.0


def test_mean_acceptance_length_counts_the_bonus_token() -> None:
    assert mean_acceptance_lengths([0.5, 0.5]) == [1.0, 1.5, 1.75]


def test_a_request_that_accepts_badly_keeps_fewer_drafts_but_one_at_least() -> None:
    good, bad = RequestAcceptance(), RequestAcceptance()
    for _ in range(40):
        good.observe(4, 4)
        bad.observe(4, 0)
    per_pos = [0.7] * 4
    assert good.worthwhile_length(per_pos, min_survival=0.3, limit=4) == 4
    assert bad.worthwhile_length(per_pos, min_survival=0.3, limit=4) == 1
    assert bad.worthwhile_length(per_pos, min_survival=0.0, limit=4) == 4
