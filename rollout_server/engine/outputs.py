"""From vLLM's ``RequestOutput`` to our records."""

from __future__ import annotations

from typing import Any

from rollout_server.engine.protocol import GeneratedSample, GenerateTimings
from rollout_server.speculation.token_origins import token_origins
from shared.schemas.rollouts import SamplingOptions, WeightVersionSpan
from shared.types import FinishReason, TokenOrigin


def sampling_arguments(sampling: SamplingOptions, n: int) -> dict[str, Any]:
    """Keyword arguments of ``vllm.SamplingParams`` (vLLM 0.32.0)."""
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "logit_bias": dict(sampling.logit_bias) or None,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "seed": sampling.seed,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logprobs": 0,
        "flat_logprobs": True,
        # Rewards and trainers read the text; the token ids are returned as sampled.
        "skip_special_tokens": True,
    }


def token_logprobs(logprobs: Any, num_tokens: int, start: int = 0) -> list[float]:
    """The sampled tokens' own logprobs from vLLM's ``FlatLogprobs``, from token ``start`` on."""
    if logprobs is None or num_tokens == 0:
        return []
    first = logprobs.start_indices
    values = logprobs.logprobs
    return [values[first[index]] for index in range(start, num_tokens)]


def version_spans(completion: Any, current_version: int) -> list[WeightVersionSpan]:
    """Half-open spans covering every token; one empty-free span when vLLM reports none."""
    num_tokens = len(completion.token_ids)
    if completion.weight_versions:
        return [
            WeightVersionSpan(version=int(span.version), start=span.start, end=span.end)
            for span in completion.weight_versions
        ]
    if num_tokens == 0:
        return []
    return [WeightVersionSpan(version=current_version, start=0, end=num_tokens)]


def to_generated_sample(completion: Any, current_version: int) -> GeneratedSample:
    """One finished ``CompletionOutput``."""
    token_ids = list(completion.token_ids)
    metrics = completion.spec_decode_metrics
    accepted = 0
    origins = TokenOrigin.PLAIN * len(token_ids)
    if metrics is not None:
        accepted = sum(length * count for length, count in enumerate(metrics.histogram))
        origins = token_origins(metrics.per_step_drafted, metrics.per_step_accepted, len(token_ids))
    return GeneratedSample(
        sample_index=completion.index,
        token_ids=token_ids,
        logprobs=token_logprobs(completion.logprobs, len(token_ids)),
        text=completion.text,
        finish_reason=FinishReason(completion.finish_reason or "abort"),
        weight_versions=version_spans(completion, current_version),
        num_draft_tokens=0 if metrics is None else metrics.num_draft_tokens,
        num_accepted_tokens=accepted,
        token_origins=origins,
    )


def generate_timings(stats: Any) -> GenerateTimings | None:
    """From ``RequestStateStats`` (vLLM 0.32.0); None without any, or when no token was sampled."""
    if stats is None or not stats.first_token_ts:
        return None
    return GenerateTimings(
        first_token_s=stats.first_token_latency,
        decode_s=max(0.0, stats.last_token_ts - stats.first_token_ts),
        num_tokens=stats.num_generation_tokens,
    )
