"""Corrects the cost model by what steps really take. Pure; time is passed in.

Two layers. Factors for the machine, for draft passes and for verification (``part_factors.py``)
hold at every load and are learned within a few steps. What they leave is a *residual* per draft
length and number of requests: where the model bends at another place than the device does. A
residual is slow, shrunk towards zero while it rests on few steps, bounded, and forgotten when it is
not confirmed. Both are moved by bounded amounts per step, so that one stalled step moves neither
far, and the machine factor cancels out of every comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log2, sqrt

from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.part_factors import PartFactors, Parts
from rollout_server.speculation.steps import StepShape

RESIDUAL_PRIOR_STEPS = 30.0
"""Steps that a residual must outweigh: the trust in the calibrated model."""
RESIDUAL_MAX_STEPS = 150.0
"""Beyond this many steps old ones are forgotten as new ones come."""
RESIDUAL_HALF_LIFE_S = 60.0
"""Evidence not renewed loses half its weight in this time."""
MAX_RESIDUAL = 0.7
"""Bound on a residual (log seconds): a factor of two."""
RESIDUAL_DEVIATION = 0.08
"""How far off (log seconds) a step never measured may be, the part factors being right."""
KNOWN_STEPS = 8.0
"""Measured steps after which that variance has halved."""
BUCKET_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of requests that share their residuals: up to and including each edge."""


class StepTimeCorrection:
    """One engine's correction."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._factors = PartFactors(model.verify_log_error, model.draft_log_error)
        self._residuals: dict[tuple[int, int], _Residual] = {}
        self._bucket_of = _bucket_table()
        self._num_reqs = 0
        """Of the last step learned from."""

    @property
    def machine_factor(self) -> float:
        """How much slower than calibrated everything is now."""
        return self._factors.machine_factor

    def observe(self, shape: StepShape, duration_s: float, time_s: float) -> None:
        """Learn from a finished step. Steps that prefill are left out: prompts differ too much."""
        if shape.num_decode_reqs == 0 or shape.num_prefill_tokens or duration_s <= 0:
            return
        key = self._bucket(shape.num_decode_reqs), shape.num_speculative_tokens
        residual = self._residuals.get(key)
        known = residual.value(time_s) if residual is not None else 0.0
        parts = self.model.parts_s(shape)
        if shape.num_decode_reqs != self._num_reqs:
            # What plain steps of another batch size take is blamed on no part but the plain one.
            doublings = abs(log2(shape.num_decode_reqs / (self._num_reqs or shape.num_decode_reqs)))
            self._factors.loosen_machine(self.model.plain_log_error * doublings)
            self._num_reqs = shape.num_decode_reqs
        left = self._factors.observe(parts, duration_s, known, time_s)
        if shape.is_steady:
            if residual is None:
                residual = self._residuals[key] = _Residual(time_s)
            residual.add(known + left, time_s)

    def unit_seconds(
        self, num_reqs: int, steady_parts: Sequence[Parts], time_s: float
    ) -> list[float]:
        """Corrected seconds of steady steps at draft lengths 0, 1, ..., without machine factor."""
        bucket = self._bucket(num_reqs)
        seconds = []
        for k, parts in enumerate(steady_parts):
            unit_s = self._factors.unit_s(parts)
            residual = self._residuals.get((bucket, k))
            seconds.append(unit_s if residual is None else unit_s * exp(residual.value(time_s)))
        return seconds

    def log_deviation(
        self, num_reqs: int, parts: Parts, other: Parts, num_speculative_tokens: int, time_s: float
    ) -> float:
        """Standard deviation of how a draft length's seconds compare to another's."""
        known = self.num_recent_steps(num_reqs, num_speculative_tokens, time_s)
        local = RESIDUAL_DEVIATION**2 / (1 + known / KNOWN_STEPS)
        return sqrt(self._factors.log_deviation(parts, other) ** 2 + local)

    def log_residual(self, num_reqs: int, num_speculative_tokens: int, time_s: float) -> float:
        """What the factors leave of the model's error in log seconds at this draft length."""
        residual = self._residuals.get((self._bucket(num_reqs), num_speculative_tokens))
        return residual.value(time_s) if residual is not None else 0.0

    def num_recent_steps(self, num_reqs: int, num_speculative_tokens: int, time_s: float) -> float:
        """Weight of the steps the residual rests on."""
        residual = self._residuals.get((self._bucket(num_reqs), num_speculative_tokens))
        return residual.weight(time_s) if residual is not None else 0.0

    def log_correction(self, num_reqs: int, num_speculative_tokens: int, time_s: float) -> float:
        """All that is corrected of a steady step's log seconds, the machine factor left out."""
        shape = StepShape.steady(num_reqs, 0, num_speculative_tokens)
        unit_s = self._factors.unit_s(self.model.parts_s(shape))
        return log(unit_s / self.model.step_s(shape)) + self.log_residual(
            num_reqs, num_speculative_tokens, time_s
        )

    def predicted_step_s(self, shape: StepShape, time_s: float) -> float:
        """Corrected seconds of a step."""
        residual = self.log_residual(shape.num_decode_reqs, shape.num_speculative_tokens, time_s)
        unit_s = self._factors.unit_s(self.model.parts_s(shape))
        return unit_s * self._factors.machine_factor * exp(residual)

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
        return min(max(mean, -MAX_RESIDUAL), MAX_RESIDUAL)

    def weight(self, time_s: float) -> float:
        return self._weight * self._fade(time_s)

    def _fade(self, time_s: float) -> float:
        return float(0.5 ** (max(time_s - self._time_s, 0.0) / RESIDUAL_HALF_LIFE_S))


def _bucket_table() -> list[int]:
    table = [0]
    for bucket, edge in enumerate(BUCKET_EDGES):
        table.extend([bucket] * (edge + 1 - len(table)))
    return table
