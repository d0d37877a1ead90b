"""What the cost of being able to speculate comes to, from the rounds of several sets of engines."""

from __future__ import annotations

from benchmarks.harness.off_cost import summarize_off
from shared.types import DrafterScheme


def rounds(*rates: tuple[float, float, float]) -> list[dict[str, float]]:
    return [dict(zip(("plain", "control", "off"), one, strict=True)) for one in rates]


def test_each_set_counts_once_whatever_its_engines_were_like() -> None:
    even = {1: rounds((10, 10, 9.8), (20, 20, 19.6), (10, 10, 1.0))}
    uneven = {1: rounds((9, 11, 9.9), (9, 11, 9.9))}
    free = {1: rounds((10, 10, 10.0))}
    found = summarize_off([even, uneven, free], DrafterScheme.INT8)
    assert found == {
        "off_ratio": {"1": 0.99},
        "off_ratio_of_sets": {"1": [0.98, 0.99, 1.0]},
        "off_control_of_sets": {"1": [1.0, 1.222, 1.0]},
        "off_scheme": "int8",
    }
