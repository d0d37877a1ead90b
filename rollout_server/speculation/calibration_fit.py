"""Fits a cost model to measured steps. Pure.

The model is linear in its coefficients and none of them is negative, so non-negative least squares
over all whole steps finds them at once; each step is weighted by its own seconds, so that what is
small is fitted as well as what is large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from rollout_server.speculation.cost_model import CostModel, PiecewiseLinear
from rollout_server.speculation.steps import StepShape

KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStep:
    """A step shape and the median of its measured seconds."""

    shape: StepShape
    duration_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FitQuality:
    """How well the model explains the very steps it was fitted to."""

    num_points: int
    median_relative_error: float
    max_relative_error: float


def fit_cost_model(points: Sequence[MeasuredStep]) -> tuple[CostModel, FitQuality]:
    """Fit the coefficients.

    Raises:
        ValueError: too few points to tell a target pass from a draft pass.
    """
    # Imported only here: an engine that finds its calibration starts without it.
    from scipy.optimize import nnls

    if len({point.shape.num_speculative_tokens for point in points}) < 2:
        raise ValueError(
            f"{len(points)} measured steps have fewer than two draft lengths among them: a draft "
            "pass cannot be told from a target pass"
        )
    target_knots = _knots([_target_rows(point.shape) for point in points])
    draft_knots = _knots(
        [p.shape.num_drafting_reqs for p in points if p.shape.num_speculative_tokens]
    )
    columns = _columns(target_knots, draft_knots)
    design_NC = np.array([[column(point.shape) for column in columns] for point in points])
    seconds_N = np.array([point.duration_s for point in points])
    # Columns count anything from single steps to millions of tokens: bring them to one scale.
    scale_C = np.maximum(np.abs(design_NC / seconds_N[:, None]).max(axis=0), 1e-30)
    solution_C, _ = nnls(design_NC / seconds_N[:, None] / scale_C, np.ones(len(points)))
    model = _model(solution_C / scale_C, target_knots, draft_knots)
    errors = [abs(model.step_s(point.shape) / point.duration_s - 1) for point in points]
    quality = FitQuality(
        num_points=len(points),
        median_relative_error=median(errors),
        max_relative_error=max(errors),
    )
    return model, quality


def _target_rows(shape: StepShape) -> int:
    return shape.num_decode_reqs + shape.num_verified_tokens


def _knots(rows: Sequence[int]) -> tuple[int, ...]:
    """Knots that the measured rows can tell apart: one between any two that were measured."""
    measured = sorted(set(rows))
    kept = [measured[0]]
    for knot in (*KNOTS, measured[-1]):
        if kept[-1] < knot <= measured[-1] and any(kept[-1] < row <= knot for row in measured):
            kept.append(knot)
    if len(kept) == 1:
        kept.append(kept[0] + 1)
    return tuple(kept)


Column = Callable[[StepShape], float]


def _ramp(knots: Sequence[int], index: int, rows: int) -> float:
    """Share of the rise between two knots that ``rows`` has taken; the last goes on for ever."""
    left, right = knots[index], knots[index + 1]
    share = max((rows - left) / (right - left), 0.0)
    return share if index == len(knots) - 2 else min(share, 1.0)


def _columns(target_knots: Sequence[int], draft_knots: Sequence[int]) -> list[Column]:
    """What each coefficient is multiplied with, in the order that ``_model`` reads them."""

    def target(index: int) -> Column:
        return lambda shape: _ramp(target_knots, index, _target_rows(shape))

    def draft(index: int) -> Column:
        return lambda shape: (
            shape.num_speculative_tokens * _ramp(draft_knots, index, shape.num_drafting_reqs)
        )

    return [
        lambda shape: 1.0,
        *(target(index) for index in range(len(target_knots) - 1)),
        lambda shape: float(shape.num_speculative_tokens),
        *(draft(index) for index in range(len(draft_knots) - 1)),
        lambda shape: float(shape.num_prefill_tokens),
        lambda shape: float(shape.num_kv_tokens),
        lambda shape: shape.num_kv_tokens * shape.num_verified_tokens / shape.num_decode_reqs,
        lambda shape: float(shape.num_verified_tokens > 0),
        lambda shape: float(shape.num_verified_tokens),
        lambda shape: float(shape.num_speculative_tokens * shape.num_kv_tokens),
    ]


def _model(
    coefficients: np.ndarray, target_knots: tuple[int, ...], draft_knots: tuple[int, ...]
) -> CostModel:
    values = [float(value) for value in coefficients]
    target, rest = values[: len(target_knots)], values[len(target_knots) :]
    draft, rest = rest[: len(draft_knots)], rest[len(draft_knots) :]
    prefill, kv_read, kv_query, verify_step, verify_row, draft_kv = rest
    return CostModel(
        target=PiecewiseLinear(knots=target_knots, values_s=_running_sum(target)),
        draft=PiecewiseLinear(knots=draft_knots, values_s=_running_sum(draft)),
        prefill_row_s=prefill,
        kv_read_s=kv_read,
        kv_query_s=kv_query,
        verify_step_s=verify_step,
        verify_row_s=verify_row,
        draft_kv_s=draft_kv,
    )


def _running_sum(rises: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.cumsum(rises))
