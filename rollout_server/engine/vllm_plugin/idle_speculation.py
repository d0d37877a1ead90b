"""Skips what a vLLM step does only because speculation is configured, when nothing is drafted.

Three wrappers, each doing what vLLM itself does without speculation. Leans on (vLLM 0.32.0):
``EngineCore.post_step``, ``GPUModelRunner._sample``, ``GPUModelRunner.propose_draft_token_ids``,
``SpecDecodeMetadata.max_spec_len``, ``SchedulerOutput.num_spec_tokens_to_schedule``.
"""

from __future__ import annotations

from typing import Any

import torch


def skip_empty_draft_exchange(post_step: Any) -> Any:
    """Wrap ``EngineCore.post_step``: with nothing drafted there is nothing to ask workers for.

    Asking is a round trip between processes, which on CPU waits behind OpenMP threads that spin.
    """

    def wrapped(core: Any, model_executed: bool) -> None:
        # An engine that slipstream did not start has vLLM's own scheduler: leave it as it is.
        if getattr(core.scheduler, "last_draft_length", 1) > 0:
            post_step(core, model_executed)

    return wrapped


def sample_plainly_without_drafts(sample: Any) -> Any:
    """Wrap ``GPUModelRunner._sample``: rejection sampling with no drafts is plain sampling.

    The rejection sampler would draw its noise for the whole vocabulary of every request again.
    """

    def wrapped(runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None and spec_decode_metadata.max_spec_len == 0:
            spec_decode_metadata = None
        return sample(runner, logits, spec_decode_metadata)

    return wrapped


def propose_nothing_without_preparation(propose: Any) -> Any:
    """Wrap ``GPUModelRunner.propose_draft_token_ids``: a draft length of 0 needs no inputs.

    Asynchronous scheduling reads the prepared next tokens, so it keeps the preparation.
    """

    def wrapped(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            scheduler_output.num_spec_tokens_to_schedule == 0
            and runner.valid_sampled_token_count_event is None
        ):
            return torch.empty(runner.input_batch.num_reqs, 0, dtype=torch.int64)
        return propose(runner, scheduler_output, *args, **kwargs)

    return wrapped
