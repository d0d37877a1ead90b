"""How long a step takes, as a function of what it computes. Pure.

A step is one target pass and ``K`` draft passes (``StepShape``)::

    seconds = target(rows) + prefill * prompt rows
            + kv_read * KV tokens + kv_query * KV tokens * drafts per request
            + verify_step [if it verifies] + verify_row * drafts verified
            + K * (draft(requests) + draft_kv * KV tokens)

``target`` and ``draft`` are piecewise linear in their rows and never fall: a matrix product is
bound by the bytes of the weights while rows are few and by arithmetic when they are many, and where
the bend lies is a property of the device, not of a formula (the paper's roofline with constants
from a data sheet is off by up to 35 % in the verification pass; reference: arXiv 2606.18967,
section on the toggle). Everything is linear in the coefficients, so whole measured cycles fit at
once (``calibration_fit.py``).
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property

from pydantic import Field, model_validator

from rollout_server.speculation.steps import StepShape
from shared.config.base import SettingsModel


class PiecewiseLinear(SettingsModel):
    """A function of a row count, never falling; beyond its last knot it goes on as before it."""

    knots: tuple[int, ...] = Field(min_length=2)
    values_s: tuple[float, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def rises(self) -> PiecewiseLinear:
        if len(self.knots) != len(self.values_s):
            raise ValueError(f"{len(self.knots)} knots for {len(self.values_s)} values")
        if any(b <= a for a, b in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError(f"knots {self.knots} do not rise")
        if any(b < a for a, b in zip(self.values_s, self.values_s[1:], strict=False)):
            raise ValueError(f"values {self.values_s} fall")
        return self

    def __call__(self, rows: int) -> float:
        knots, values = self.knots, self.values_s
        right = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
        left = right - 1
        share = (rows - knots[left]) / (knots[right] - knots[left])
        # Below the first knot nothing is cheaper: a pass reads all weights for one row too.
        return values[left] + max(share, 0.0) * (values[right] - values[left])


class CostModel(SettingsModel):
    """Coefficients in seconds."""

    target: PiecewiseLinear
    draft: PiecewiseLinear
    prefill_row_s: float = Field(default=0.0, ge=0.0)
    kv_read_s: float = Field(default=0.0, ge=0.0)
    kv_query_s: float = Field(default=0.0, ge=0.0)
    verify_step_s: float = Field(default=0.0, ge=0.0)
    verify_row_s: float = Field(default=0.0, ge=0.0)
    draft_kv_s: float = Field(default=0.0, ge=0.0)
    plain_log_error: float = Field(default=0.03, ge=0.0)
    """How a plain step grows with each doubling of the requests may be wrong by this (standard
    deviation of log seconds)."""
    verify_log_error: float = Field(default=0.2, ge=0.0)
    """What verification adds may be wrong by this (standard deviation of log seconds)."""
    draft_log_error: float = Field(default=0.2, ge=0.0)
    """The same of a draft pass."""

    def step_s(self, shape: StepShape) -> float:
        """Seconds of a step."""
        plain_s, verify_s, drafts_s = self.parts_s(shape)
        return plain_s + verify_s + drafts_s + self.prefill_row_s * shape.num_prefill_tokens

    def parts_s(self, shape: StepShape) -> tuple[float, float, float]:
        """Seconds of plain decoding, of what verification adds, and of draft passes."""
        reqs, verified = shape.num_decode_reqs, shape.num_verified_tokens
        target_s = self._target_s(reqs)
        verify_s = drafts_s = 0.0
        if verified:
            verify_s = (
                self._target_s(reqs + verified)
                - target_s
                + self.kv_query_s * shape.num_kv_tokens * verified / max(reqs, 1)
                + self.verify_step_s
                + self.verify_row_s * verified
            )
        if shape.num_speculative_tokens:
            drafts_s = shape.num_speculative_tokens * self.draft_pass_s(
                shape.num_drafting_reqs, shape.num_kv_tokens
            )
        return target_s + self.kv_read_s * shape.num_kv_tokens, verify_s, drafts_s

    def draft_pass_s(self, num_reqs: int, num_kv_tokens: int) -> float:
        """Seconds of one draft pass."""
        return self._draft_s(num_reqs) + self.draft_kv_s * num_kv_tokens

    def steady_parts_s(
        self, num_reqs: int, num_kv_tokens: int, max_draft_length: int
    ) -> list[tuple[float, float, float]]:
        """``parts_s`` of ``StepShape.steady`` at draft lengths 0 to ``max_draft_length``.

        Asked at every step, so without the objects.
        """
        target_s = self._target_s(num_reqs)
        plain_s = target_s + self.kv_read_s * num_kv_tokens
        draft_s = self._draft_s(num_reqs) + self.draft_kv_s * num_kv_tokens
        per_draft_s = self.kv_query_s * num_kv_tokens + self.verify_row_s * num_reqs
        once_s = self.verify_step_s - target_s
        parts = [(plain_s, 0.0, 0.0)]
        for k in range(1, max_draft_length + 1):
            verify_s = self._target_s(num_reqs * (k + 1)) + once_s + per_draft_s * k
            parts.append((plain_s, verify_s, k * draft_s))
        return parts

    def steady_step_s(
        self, num_reqs: int, num_kv_tokens: int, num_speculative_tokens: int
    ) -> float:
        """``step_s`` of ``StepShape.steady``."""
        return self.step_s(StepShape.steady(num_reqs, num_kv_tokens, num_speculative_tokens))

    def ratios(
        self, num_reqs: int, num_kv_tokens: int, num_speculative_tokens: int
    ) -> tuple[float, float]:
        """``c`` and ``v``: a draft pass and a verification pass over a plain step."""
        k = num_speculative_tokens
        plain_s = self.steady_step_s(num_reqs, num_kv_tokens, 0)
        draft_s = self.draft_pass_s(num_reqs, num_kv_tokens)
        verify_s = self.steady_step_s(num_reqs, num_kv_tokens, k) - k * draft_s
        return draft_s / plain_s, verify_s / plain_s

    def _target_s(self, rows: int) -> float:
        seconds = self._target_memo.get(rows)
        if seconds is None:
            seconds = self._target_memo[rows] = self.target(rows)
        return seconds

    def _draft_s(self, rows: int) -> float:
        seconds = self._draft_memo.get(rows)
        if seconds is None:
            seconds = self._draft_memo[rows] = self.draft(rows)
        return seconds

    @cached_property
    def _target_memo(self) -> dict[int, float]:
        """Row counts already interpolated: an engine has a few hundred, and asks at every step."""
        return {}

    @cached_property
    def _draft_memo(self) -> dict[int, float]:
        return {}


def conservative_model() -> CostModel:
    """For a combination nobody has measured: a rule, not another device's figures.

    In units of a plain step of one request. A draft pass is taken to cost half a step, and each
    row beyond a request's first a sixteenth of one: with good acceptance that drafts for at most
    about four sequences. Measured steps correct it from there.
    """
    return CostModel(
        target=PiecewiseLinear(knots=(1, 2), values_s=(1.0, 1.0)),
        draft=PiecewiseLinear(knots=(1, 2), values_s=(0.5, 0.5)),
        verify_row_s=1 / 16,
        plain_log_error=0.35,
        verify_log_error=1.0,
        draft_log_error=0.5,
    )
