"""From generated samples to OpenAI's response bodies. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.collaborators import Tokenizer
from rollout_server.completions.job import CompletionJob
from rollout_server.engine.protocol import GenerateDelta, GeneratedSample, GenerateResult
from shared.schemas.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    CompletionUsage,
)


def completion_response(
    job: CompletionJob, results: Sequence[GenerateResult], tokenizer: Tokenizer
) -> CompletionResponse:
    """The whole answer; choices are numbered prompt by prompt."""
    choices = [
        _choice(job, prompt_index, sample, tokenizer)
        for prompt_index, result in enumerate(results)
        for sample in result.samples
    ]
    num_completion_tokens = sum(
        len(sample.token_ids) for result in results for sample in result.samples
    )
    return CompletionResponse(
        id=job.completion_id,
        created=job.created,
        model=job.request.model,
        choices=choices,
        usage=completion_usage(job, num_completion_tokens),
    )


def delta_response(
    job: CompletionJob,
    prompt_index: int,
    delta: GenerateDelta,
    tokenizer: Tokenizer,
    text_offset: int | None,
) -> CompletionResponse:
    """One chunk of a stream.

    Args:
        text_offset: characters of this choice that went out before; None for its first chunk.
    """
    request = job.request
    logprobs = None
    if request.logprobs is not None:
        logprobs = token_logprobs(delta.token_ids, delta.logprobs, tokenizer, text_offset or 0)
    prompt_token_ids = None
    if request.return_token_ids and text_offset is None:
        prompt_token_ids = job.groups[prompt_index].prompt_token_ids
    choice = CompletionChoice(
        index=prompt_index * request.n + delta.sample_index,
        text=delta.text,
        finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
        logprobs=logprobs,
        prompt_token_ids=prompt_token_ids,
        token_ids=delta.token_ids if request.return_token_ids else None,
        weight_versions=delta.weight_versions if request.return_token_ids else None,
    )
    return CompletionResponse(
        id=job.completion_id, created=job.created, model=request.model, choices=[choice]
    )


def usage_response(job: CompletionJob, num_completion_tokens: int) -> CompletionResponse:
    """The chunk ``stream_options.include_usage`` asks for: no choices, the usage."""
    return CompletionResponse(
        id=job.completion_id,
        created=job.created,
        model=job.request.model,
        choices=[],
        usage=completion_usage(job, num_completion_tokens),
    )


def completion_usage(job: CompletionJob, num_completion_tokens: int) -> CompletionUsage:
    """OpenAI's token counts."""
    return CompletionUsage(
        prompt_tokens=job.num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        total_tokens=job.num_prompt_tokens + num_completion_tokens,
    )


def token_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[float], tokenizer: Tokenizer, text_offset: int
) -> CompletionLogprobs:
    """OpenAI's block for the sampled tokens; offsets are in characters of the decoded tokens."""
    tokens = [tokenizer.decode([token_id]) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    return CompletionLogprobs(tokens=tokens, token_logprobs=list(logprobs), text_offset=offsets)


def _choice(
    job: CompletionJob, prompt_index: int, sample: GeneratedSample, tokenizer: Tokenizer
) -> CompletionChoice:
    request = job.request
    logprobs = None
    if request.logprobs is not None:
        logprobs = token_logprobs(sample.token_ids, sample.logprobs, tokenizer, 0)
    with_ids = request.return_token_ids
    return CompletionChoice(
        index=prompt_index * request.n + sample.sample_index,
        text=sample.text,
        finish_reason=sample.finish_reason.value,
        logprobs=logprobs,
        prompt_token_ids=job.groups[prompt_index].prompt_token_ids if with_ids else None,
        token_ids=sample.token_ids if with_ids else None,
        weight_versions=sample.weight_versions if with_ids else None,
    )
