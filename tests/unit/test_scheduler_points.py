"""How turns at a steady load are summed up."""

from __future__ import annotations

from benchmarks.harness.scheduler_points import Load, Slice, summarize_point
from benchmarks.scheduler import with_new_points

LOAD = Load(num_reqs=2, num_prompt_tokens=32)


def rounds(*rates: dict[str, float], steps: list[int] | None = None) -> list[dict[str, Slice]]:
    return [{side: Slice(rate, steps or [0, 5]) for side, rate in r.items()} for r in rates]


def test_the_best_fixed_length_is_that_of_the_medians_and_ratios_are_taken_within_a_round() -> None:
    measured = rounds(
        {"0": 10, "1": 12, "adaptive": 11},
        {"0": 20, "1": 22, "adaptive": 22},
        {"0": 10, "1": 9, "adaptive": 12},
    )
    point = summarize_point(LOAD, measured, "adaptive")
    assert (point["load"], point["best_fixed_k"]) == ("2x32", 1)
    assert point["fixed_ratios_to_off"] == {"0": 1.0, "1": 1.1}
    assert point["ratio_to_best_fixed"] == 1.0
    assert point["adaptive_ratio_to_off"] == 1.1
    assert point["sign_right"]


def test_a_lucky_round_does_not_choose_its_own_best() -> None:
    measured = rounds({"0": 10, "1": 9, "adaptive": 10}, {"0": 10, "1": 30, "adaptive": 10})
    point = summarize_point(LOAD, measured, "adaptive")
    assert point["best_fixed_k"] == 1
    # The second round is held against 0, the best of the first; the first against 1.
    assert point["ratio_to_best_of_others"] == round((10 / 9 + 1) / 2, 3)


def test_the_sign_is_wrong_when_most_steps_draft_and_plain_decoding_is_best() -> None:
    measured = rounds(*[{"0": 10, "1": 9, "adaptive": 9}] * 3)
    assert not summarize_point(LOAD, measured, "adaptive")["sign_right"]
    measured = rounds(*[{"0": 10, "1": 9, "adaptive": 9}] * 3, steps=[5, 4])
    assert summarize_point(LOAD, measured, "adaptive")["sign_right"]


def test_a_load_that_is_measured_again_replaces_its_point_in_its_place() -> None:
    old = [{"load": name, "ratio": 0} for name in ("1x32", "4x32", "1x512")]
    new = [{"load": name, "ratio": 1} for name in ("2x32", "4x32")]
    merged = with_new_points(old, new)
    assert [(point["load"], point["ratio"]) for point in merged] == [
        ("1x32", 0),
        ("2x32", 1),
        ("4x32", 1),
        ("1x512", 0),
    ]
