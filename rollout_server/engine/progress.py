"""Reads, without slowing generation, what running requests have sampled so far.

vLLM keeps tokens, logprobs and weight versions of every request in its front end, beside the
engine core's process; asking for final outputs only makes nothing be sent, not nothing be kept.
Leans on vLLM 0.32.0: ``OutputProcessor.external_req_ids``, ``.request_states``,
``RequestState`` (``detokenizer``, ``logprobs_processor``, ``weight_version_starts``) and
``ParentRequest.output_aggregator``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rollout_server.engine.outputs import to_generated_sample, token_logprobs
from rollout_server.engine.protocol import KnownTokens, SampleProgress
from shared.schemas.rollouts import WeightVersionSpan


def read_progress(
    output_processor: Any, known: Mapping[str, KnownTokens], current_version: int
) -> dict[str, list[SampleProgress]]:
    """What the caller does not know yet. Runs between two updates of the output processor.

    Args:
        output_processor: ``AsyncLLM.output_processor``.
        known: what the caller has, by request id.
        current_version: of tokens that vLLM gives no version for.

    Returns:
        By request id, samples with news. Requests that are over are absent.
    """
    progress: dict[str, list[SampleProgress]] = {}
    for request_id, known_tokens in known.items():
        states = [
            output_processor.request_states[internal_id]
            for internal_id in output_processor.external_req_ids.get(request_id, ())
            if internal_id in output_processor.request_states
        ]
        if states:
            progress[request_id] = [
                *_running(states, known_tokens, current_version),
                *_finished(states[0].parent_req, known_tokens, current_version),
            ]
    return progress


def _running(
    states: list[Any], known: KnownTokens, current_version: int
) -> Iterator[SampleProgress]:
    for state in states:
        token_ids = state.detokenizer.output_token_ids
        start = known.num_tokens.get(state.request_index, 0)
        num_tokens = len(token_ids)
        if num_tokens > start:
            yield SampleProgress(
                sample_index=state.request_index,
                start=start,
                token_ids=list(token_ids[start:]),
                logprobs=token_logprobs(state.logprobs_processor.logprobs, num_tokens, start),
                weight_versions=_spans(state.weight_version_starts, num_tokens, current_version),
            )


def _finished(parent: Any, known: KnownTokens, current_version: int) -> Iterator[SampleProgress]:
    """vLLM keeps a finished sample until the last of its siblings has finished too."""
    for completion in [] if parent is None else parent.output_aggregator:
        if completion is not None and completion.index not in known.finished:
            sample = to_generated_sample(completion, current_version)
            yield SampleProgress(sample_index=sample.sample_index, whole=sample)


def _spans(
    starts: list[tuple[str, int]], num_tokens: int, current_version: int
) -> list[WeightVersionSpan]:
    """As ``RequestState`` makes them when a request ends."""
    named = [(int(version), start) for version, start in starts] or [(current_version, 0)]
    ends = [start for _, start in named[1:]] + [num_tokens]
    return [
        WeightVersionSpan(version=version, start=start, end=end)
        for (version, start), end in zip(named, ends, strict=True)
    ]
