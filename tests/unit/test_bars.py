"""Verdicts of benchmarks."""

from __future__ import annotations

import pytest

from benchmarks.harness.bars import judged

BARS = {"speed": {"at_least": 2.0}, "cost": {"at_most": 5.0}}


@pytest.mark.parametrize(
    ("speed", "cost", "met"),
    [(2.0, 5.0, [True, True]), (1.9, 5.1, [False, False]), (None, None, [False, False])],
)
def test_a_bar_is_met_at_its_edge_and_never_by_what_was_not_measured(
    speed: float | None, cost: float | None, met: list[bool]
) -> None:
    verdicts = judged({"speed": speed, "cost": cost}, BARS)
    assert [verdict["met"] for verdict in verdicts.values()] == met
    assert verdicts["speed"] == {"value": speed, "at_least": 2.0, "met": met[0]}
