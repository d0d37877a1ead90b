"""What ``make chaos`` is made of: who is hit in the middle of what, and how it is added up."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.chaos import BAD, report
from tests.chaos.checked_clients import SampleCounts, unaccounted
from tests.chaos.engine_kills import KillCounts
from tests.chaos.schedule import LOCAL_VICTIMS, MOMENTS, Moment, Victim, schedule
from tests.chaos.tally import Tally, load, save

BOOKS = {
    "samples_accepted_total": 10.0,
    "samples_delivered_total": 8.0,
    "samples_failed_total": 0.0,
    "samples_cancelled_total": 2.0,
    "samples_unaccounted": 0.0,
    "pending_samples": 0.0,
}


def test_every_victim_meets_with_every_moment_of_its() -> None:
    found = set(itertools.islice(schedule(LOCAL_VICTIMS), len(LOCAL_VICTIMS) * len(Moment)))
    assert found == {
        (victim, moment)
        for victim in LOCAL_VICTIMS
        for moment in MOMENTS.get(victim, tuple(Moment))
    }


def test_victims_come_in_turn() -> None:
    count = Counter(v for v, _ in itertools.islice(schedule(LOCAL_VICTIMS), 80))
    assert set(count.values()) == {10}


def test_a_cluster_is_needed_for_raylets_only() -> None:
    assert set(Victim) - set(LOCAL_VICTIMS) == {Victim.RAYLET}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 0),
        ({"samples_delivered_total": 7.0}, 2),
        ({"samples_failed_total": 1.0}, 1),
        ({"pending_samples": 3.0}, 3),
        ({"samples_unaccounted": -1.0}, 1),
    ],
)
def test_samples_that_the_books_do_not_tell_of(change: dict[str, float], expected: int) -> None:
    assert unaccounted({**BOOKS, **change}, num_checked=8) == expected


def tally(kills: int) -> Tally:
    return Tally(
        kills=KillCounts(
            kills=Counter({"engine": kills}), recovery_s=[1.5] * kills, leftover_files=1
        ),
        samples=SampleCounts(checked=10 * kills, causes=["gone"]),
    )


def test_a_run_goes_on_with_what_it_had(tmp_path: Path) -> None:
    save(tmp_path / "state.json", tally(2), "abc")
    together = load(tmp_path / "state.json", "abc").plus(tally(1))
    assert together.kills.kills == Counter({"engine": 3})
    assert together.kills.recovery_s == [1.5] * 3
    assert (together.samples.checked, together.kills.leftover_files) == (30, 2)
    assert together.samples.causes == ["gone"] * 2


def test_figures_of_two_commits_are_not_added(tmp_path: Path) -> None:
    save(tmp_path / "state.json", tally(2), "abc")
    with pytest.raises(ValueError, match="commit abc, not def"):
        load(tmp_path / "state.json", "def")


def part(**values: Any) -> dict[str, Any]:
    return {
        "kills": {"engine": 3},
        "moments": {"pushing": 2, "generating": 1},
        "checked": 100,
        "detection_s": [1.0, 2.0, 3.0],
        "frozen_detection_s": [],
        "recovery_s": [20.0],
        "beyond_start_s": [4.0],
        **values,
    }


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_in_one_part_is_bad_in_all(name: str) -> None:
    nodes = part(kills={"raylet": 2}, **{name: 1})
    result = report({"processes": part(), "nodes": nodes, "fakes": {"kills": 5}})
    assert result["chaos"][name] == 1
    assert (result["chaos"]["kills"], result["chaos"]["fake_kills"]) == (5, 5)
    assert result["kills_by_moment"] == {"generating": 2, "pushing": 4}
    assert result["chaos"]["detection_s_p50"] == 2.0
    assert "frozen_detection_s_p50" not in result["chaos"]
