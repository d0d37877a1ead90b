"""Corrects the cost model by what steps really take. Pure; time is passed in.

The logarithm of measured over predicted seconds is split in two::

    log(measured / predicted) = machine + residual[requests, K]

``machine`` is the same for every draft length: another load on the machine, a slower clock. It
follows within a second and cancels out of every comparison. ``residual`` is what the model gets
wrong about one draft length at one number of requests; it decides, so it is slow, shrunk towards
zero while it rests on few steps, bounded, and forgotten when it is not confirmed. Both move by
bounded amounts per step, so that one stalled step moves neither far.
"""

from __future__ import annotations

from math import exp, log

from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.steps import StepShape

MACHINE_GAIN = 0.08
"""Share of a step's surprise that the machine factor takes over."""
MAX_SURPRISE = 0.35
"""Bound on one step's surprise (log seconds): a stall of any length counts as a factor of 1.4."""
RESIDUAL_PRIOR_STEPS = 12.0
"""Steps that a residual must outweigh: the trust in the calibrated model."""
RESIDUAL_MAX_STEPS = 150.0
"""Beyond this many steps old ones are forgotten as new ones come."""
RESIDUAL_HALF_LIFE_S = 60.0
"""Evidence not renewed loses half its weight in this time."""
MAX_RESIDUAL = 0.7
"""Bound on a residual (log seconds): a factor of two."""
BUCKET_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of requests that share their residuals: up to and including each edge."""


class StepTimeCorrection:
    """One engine's correction."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._machine = 0.0
        self._num_observed = 0
        self._residuals: dict[tuple[int, int], _Residual] = {}
        self._bucket_of = _bucket_table()

    @property
    def machine_factor(self) -> float:
        """How much slower than calibrated everything is now."""
        return exp(self._machine)

    def observe(self, shape: StepShape, duration_s: float, time_s: float) -> None:
        """Learn from a finished step. Steps that prefill are left out: prompts differ too much."""
        if shape.num_decode_reqs == 0 or shape.num_prefill_tokens or duration_s <= 0:
            return
        error = log(duration_s / self.model.step_s(shape))
        residual = self._residuals.get(self._key(shape.num_decode_reqs, shape))
        known = residual.value(time_s) if residual is not None else 0.0
        # The first steps set the machine factor by their mean; later ones pull it along.
        self._num_observed += 1
        gain = max(1 / self._num_observed, MACHINE_GAIN)
        surprise = error - known - self._machine
        if self._num_observed > 1:
            surprise = _clip(surprise, MAX_SURPRISE)
        # What the residual is told is measured against the machine factor before this step.
        if shape.is_steady and self._num_observed > 1:
            if residual is None:
                key = self._key(shape.num_decode_reqs, shape)
                residual = self._residuals[key] = _Residual(time_s)
            residual.add(known + surprise, time_s)
        self._machine += gain * surprise

    def log_residual(self, num_reqs: int, num_speculative_tokens: int, time_s: float) -> float:
        """What the model's log seconds miss at this draft length."""
        residual = self._residuals.get((self._bucket(num_reqs), num_speculative_tokens))
        return residual.value(time_s) if residual is not None else 0.0

    def num_recent_steps(self, num_reqs: int, num_speculative_tokens: int, time_s: float) -> float:
        """Weight of the steps the residual rests on."""
        residual = self._residuals.get((self._bucket(num_reqs), num_speculative_tokens))
        return residual.weight(time_s) if residual is not None else 0.0

    def predicted_step_s(self, shape: StepShape, time_s: float) -> float:
        """Corrected seconds of a step."""
        residual = self.log_residual(shape.num_decode_reqs, shape.num_speculative_tokens, time_s)
        return self.model.step_s(shape) * exp(self._machine + residual)

    def _key(self, num_reqs: int, shape: StepShape) -> tuple[int, int]:
        return self._bucket(num_reqs), shape.num_speculative_tokens

    def _bucket(self, num_reqs: int) -> int:
        table = self._bucket_of
        return table[num_reqs] if num_reqs < len(table) else len(BUCKET_EDGES)


class _Residual:
    """A mean that shrinks to zero while it rests on little."""

    __slots__ = ("_sum", "_time_s", "_weight")

    def __init__(self, time_s: float) -> None:
        self._sum = 0.0
        self._weight = 0.0
        self._time_s = time_s

    def add(self, value: float, time_s: float) -> None:
        fade = self._fade(time_s) * (1 - 1 / RESIDUAL_MAX_STEPS)
        self._sum = self._sum * fade + value
        self._weight = self._weight * fade + 1
        self._time_s = time_s

    def value(self, time_s: float) -> float:
        fade = self._fade(time_s)
        mean = self._sum * fade / (self._weight * fade + RESIDUAL_PRIOR_STEPS)
        return _clip(mean, MAX_RESIDUAL)

    def weight(self, time_s: float) -> float:
        return self._weight * self._fade(time_s)

    def _fade(self, time_s: float) -> float:
        return float(0.5 ** (max(time_s - self._time_s, 0.0) / RESIDUAL_HALF_LIFE_S))


def _clip(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


def _bucket_table() -> list[int]:
    table = [0]
    for bucket, edge in enumerate(BUCKET_EDGES):
        table.extend([bucket] * (edge + 1 - len(table)))
    return table
