"""What a benchmark is held to. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Bars = Mapping[str, Mapping[str, float]]
"""By the name of a figure: ``at_least`` or ``at_most``."""


def judged(result: Mapping[str, Any], bars: Bars) -> dict[str, Any]:
    """Each bar with its verdict; what was not measured is not met."""
    verdicts = {}
    for name, bar in bars.items():
        value = result[name]
        met = value is not None and (
            value >= bar["at_least"] if "at_least" in bar else value <= bar["at_most"]
        )
        verdicts[name] = {"value": value, **bar, "met": met}
    return verdicts
