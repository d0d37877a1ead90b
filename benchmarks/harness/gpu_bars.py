"""The bars of the GPU check, judged on the 7B shape. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_COST_RATIO = 0.40
"""c: one draft pass over one plain step, at batch 1."""
MIN_SPEEDUP = 1.40
"""At batch 1 and the synthetic acceptance, at the best draft length."""
MAX_REQUANTIZATION_MS = 50.0


def judge_bars(part: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Value, limit and verdict of each bar; a value that was not measured is not met."""
    points = [
        point
        for point in part.get("points", [])
        if point["batch"] == 1 and point["synthetic_acceptance"] is not None
    ]
    cost = min((point["c"] for point in points), default=None)
    speedup = max((point["ratio"] for point in points), default=None)
    requantization_ms = part.get("requantization", {}).get("ms")
    return {
        "c_batch_1": _at_most(cost, MAX_COST_RATIO),
        "speedup_batch_1": {
            "value": speedup,
            "at_least": MIN_SPEEDUP,
            "met": speedup is not None and speedup >= MIN_SPEEDUP,
        },
        "requantization_ms": _at_most(requantization_ms, MAX_REQUANTIZATION_MS),
    }


def _at_most(value: float | None, limit: float) -> dict[str, Any]:
    return {"value": value, "at_most": limit, "met": value is not None and value <= limit}
