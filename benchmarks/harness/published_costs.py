"""Published A100 figures of a W4 self-drafter, as cost models for the simulator. Never for engines.

They are another system's figures on another device (EfficientRollout, arXiv 2606.18967: one
A100-SXM4-80GB, TP 1, vLLM 0.11.2), read from its sweeps: they have no ``CalibrationKey``, live
outside ``deploy/calibration`` and outside ``rollout_server``, and so cannot be found by an engine.

Two sources, both kept under ``shared/reference`` of the project: the medians at context 2048
(bars-of-the-field, B2: a draft pass and a verification pass over a plain step, per batch, for 7B,
and the speedups for 14B), and the fitted roofline (paper, section 3). The roofline gives plain
steps, which it explains within 2 to 3.4 %; where medians are published they replace its draft and
verification passes, which it explains within 6 to 16 %; the 8B model has the roofline only.

Known to be optimistic for long contexts: the sweeps ran one prompt many times with the prefix cache
on, and their seconds per KV token are 0.46 / 0.19 / 0.24 of what reading distinct KV takes.
``distinct_kv`` charges the whole of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from rollout_server.speculation.calibration_fit import FitQuality, MeasuredStep, fit_cost_model
from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.steps import StepShape

DEVICE = "A100-SXM4-80GB (published figures)"
CONTEXT = 2048
FLOP_PER_S = 233.5e12
BATCHES = (1, 4, 8, 16, 32, 48, 64)
DRAFT_LENGTHS = (3, 7)
BYTES_PER_ELEMENT = 2
DRAFT_KV_S_7B = 26e-9
"""Seconds per KV token of a 7B draft pass: r rises from 0.53 to 0.56 at batch 16 and from 0.92 to
1.07 at 64 as the context goes from 2048 to 4096, which is 19 and 33 ns; their mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """A model's dimensions and the published constants of its roofline."""

    name: str
    num_params: float
    num_matmul_params: float
    """Without the input embedding, which is looked up."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_attention_heads: int
    bytes_per_s: float
    kv_share: float
    """Fitted bytes per KV token over the true ones."""
    draft_inefficiency: float
    draft_bytes: float
    plain_req_s: float
    draft_req_s: float
    verify_req_s: float
    always_on_length: int
    """Draft length of the publication's always-on runs."""
    acceptance: float
    """Its measured acceptance, the same at every position."""

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES_PER_ELEMENT

    @property
    def num_kv_tokens(self) -> int:
        """Slots of 64 GB (0.8 of the device) less both sets of weights and 3 GB of activations.

        The drafter's new bytes are what its table lists without the shared embedding and head.
        """
        weights = self.num_params * BYTES_PER_ELEMENT
        drafter = self.num_matmul_params * 0.52
        return int((64e9 - 3e9 - weights - drafter) / self.kv_token_bytes)

    def plain_s(self, num_reqs: int, context: int) -> float:
        return self._target_s(num_reqs, num_reqs * context, 1) + self.plain_req_s * num_reqs

    def verify_s(self, num_reqs: int, context: int, num_drafts: int) -> float:
        seconds = self._target_s(num_reqs * (num_drafts + 1), num_reqs * context, num_drafts + 1)
        return seconds + self.verify_req_s * num_reqs

    def draft_s(self, num_reqs: int, context: int) -> float:
        weights = self.draft_inefficiency * self.draft_bytes
        kv = self.kv_share * self.kv_token_bytes * num_reqs * context
        return max((weights + kv) / self.bytes_per_s, self._compute_s(num_reqs, context)) + (
            self.draft_req_s * num_reqs
        )

    def _target_s(self, rows: int, num_kv_tokens: int, rows_per_req: int) -> float:
        weights = self.num_params * BYTES_PER_ELEMENT
        kv = self.kv_share * self.kv_token_bytes * num_kv_tokens
        context = num_kv_tokens * rows_per_req // rows
        return max((weights + kv) / self.bytes_per_s, self._compute_s(rows, context))

    def _compute_s(self, rows: int, context: int) -> float:
        attention = 4 * self.num_attention_heads * self.head_dim * self.num_layers * context
        return rows * (2 * self.num_matmul_params + attention) / FLOP_PER_S


MODEL_7B = PublishedModel(
    name="Qwen2.5-7B",
    num_params=7.62e9,
    num_matmul_params=7.07e9,
    num_layers=28,
    num_kv_heads=4,
    head_dim=128,
    num_attention_heads=28,
    bytes_per_s=1.62e12,
    kv_share=0.46,
    draft_inefficiency=1.33,
    draft_bytes=5.1e9,
    plain_req_s=39e-6,
    draft_req_s=69e-6,
    verify_req_s=152e-6,
    always_on_length=7,
    acceptance=0.98,
)
MODEL_8B = PublishedModel(
    name="Llama-3.1-8B",
    num_params=8.03e9,
    num_matmul_params=7.50e9,
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    num_attention_heads=32,
    bytes_per_s=1.57e12,
    kv_share=0.19,
    draft_inefficiency=1.41,
    draft_bytes=5.2e9,
    plain_req_s=74e-6,
    draft_req_s=86e-6,
    verify_req_s=214e-6,
    always_on_length=5,
    acceptance=0.96,
)
MODEL_14B = PublishedModel(
    name="Qwen2.5-14B",
    num_params=14.77e9,
    num_matmul_params=13.99e9,
    num_layers=48,
    num_kv_heads=8,
    head_dim=128,
    num_attention_heads=40,
    bytes_per_s=1.56e12,
    kv_share=0.24,
    draft_inefficiency=1.27,
    draft_bytes=9.0e9,
    plain_req_s=50e-6,
    draft_req_s=154e-6,
    verify_req_s=232e-6,
    always_on_length=5,
    acceptance=0.97,
)
MODELS = (MODEL_7B, MODEL_8B, MODEL_14B)

DRAFT_RATIO_7B = dict(zip(BATCHES, (0.46, 0.50, 0.49, 0.53, 0.65, 0.73, 0.92), strict=True))
VERIFY_RATIO_7B = {
    3: dict(zip(BATCHES, (1.07, 1.19, 1.19, 1.28, 1.20, 1.41, 1.53), strict=True)),
    7: dict(zip(BATCHES, (1.10, 1.23, 1.32, 1.36, 1.65, 2.22, 2.71), strict=True)),
}
SPEEDUP_AT_95: Mapping[str, Mapping[int, Mapping[int, float]]] = {
    MODEL_7B.name: {
        3: dict(zip(BATCHES, (1.51, 1.39, 1.39, 1.29, 1.18, 1.03, 0.86), strict=True)),
        7: dict(zip(BATCHES, (1.56, 1.43, 1.41, 1.32, 1.09, 0.92, 0.74), strict=True)),
    },
    MODEL_14B.name: {
        3: dict(zip(BATCHES, (1.57, 1.46, 1.42, 1.44, 1.14, 0.92, 0.80), strict=True)),
        7: dict(zip(BATCHES, (1.65, 1.53, 1.49, 1.43, 1.04, 0.83, 0.68), strict=True)),
    },
}
"""Published speedups at context 2048 and acceptance 0.95: by model, draft length and batch."""


def mean_acceptance_length(acceptance: float, num_drafts: int) -> float:
    """Tokens of a cycle at one acceptance for every position."""
    return sum(acceptance**position for position in range(num_drafts + 1))


@cache
def published_cost_model(
    model: PublishedModel, *, distinct_kv: bool = False
) -> tuple[CostModel, FitQuality]:
    """A cost model of the published figures, and how well it explains them."""
    fitted, quality = fit_cost_model(list(_points(model)))
    extra_s = (1 - model.kv_share) * model.kv_token_bytes / model.bytes_per_s if distinct_kv else 0
    changes = {
        # The roofline's arithmetic: prompts are many rows at once, so nothing but arithmetic.
        "prefill_row_s": 2 * model.num_matmul_params / FLOP_PER_S,
        "kv_read_s": fitted.kv_read_s + extra_s,
        "draft_kv_s": fitted.draft_kv_s + extra_s,
    }
    return CostModel.model_validate(fitted.model_dump() | changes), quality


def _points(model: PublishedModel) -> Iterator[MeasuredStep]:
    """Whole cycles of steady batches, with the published ratios in place of the roofline's."""
    for context in (512, CONTEXT, 4096):
        for num_reqs in (*BATCHES, 96, 128):
            shape = StepShape.steady(num_reqs, num_reqs * context, 0)
            yield MeasuredStep(shape=shape, duration_s=model.plain_s(num_reqs, context))
        for num_reqs in BATCHES:
            plain_s = model.plain_s(num_reqs, context)
            for num_drafts in DRAFT_LENGTHS:
                draft_s, verify_s = _passes_s(model, num_reqs, context, num_drafts)
                drafts_s = num_drafts * draft_s
                kv_tokens = num_reqs * context
                steady = StepShape.steady(num_reqs, kv_tokens, num_drafts)
                # Apart too: whole cycles alone cannot tell which pass reads the KV cache.
                only_drafts = replace(steady, num_verified_tokens=0)
                only_verifies = replace(steady, num_speculative_tokens=0)
                yield MeasuredStep(shape=steady, duration_s=drafts_s + verify_s)
                yield MeasuredStep(shape=only_drafts, duration_s=plain_s + drafts_s)
                yield MeasuredStep(shape=only_verifies, duration_s=verify_s)


def _passes_s(
    model: PublishedModel, num_reqs: int, context: int, num_drafts: int
) -> tuple[float, float]:
    """Seconds of a draft pass and of a verification pass."""
    draft_s = model.draft_s(num_reqs, context)
    verify_s = model.verify_s(num_reqs, context, num_drafts)
    plain_s = model.plain_s(num_reqs, CONTEXT)
    if model is MODEL_7B:
        more_kv = num_reqs * (context - CONTEXT)
        draft_s = DRAFT_RATIO_7B[num_reqs] * plain_s + DRAFT_KV_S_7B * more_kv
        kv_s = model.kv_share * model.kv_token_bytes / model.bytes_per_s
        return draft_s, VERIFY_RATIO_7B[num_drafts][num_reqs] * plain_s + kv_s * more_kv
    if model.name in SPEEDUP_AT_95:
        # The published figure holds at one context; the roofline carries it to the others.
        length = mean_acceptance_length(0.95, num_drafts)
        published_s = plain_s * length / SPEEDUP_AT_95[model.name][num_drafts][num_reqs]
        roofline_s = num_drafts * model.draft_s(num_reqs, CONTEXT) + model.verify_s(
            num_reqs, CONTEXT, num_drafts
        )
        share = published_s / roofline_s
        return draft_s * share, verify_s * share
    return draft_s, verify_s
