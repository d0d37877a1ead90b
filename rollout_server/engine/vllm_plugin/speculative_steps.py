"""What the plugin changes in vLLM's steps that draft or verify.

- Verification is ``drafter/verification.py`` instead of vLLM's rejection sampler: it keeps each
  draft's own distribution, draws from one row per request, and knows min-p and logit bias.
- Drafts travel to the scheduler with the step's output instead of by a call of their own (where
  vLLM schedules synchronously; on CPU a call waits behind OpenMP threads that spin).
- A sequence near the end of its context does not keep the others from drafting: positions past the
  end get no KV slot, and the scheduler trims their drafts.

Leans on (vLLM 0.32.0): ``GPUModelRunner._sample``, ``propose_draft_token_ids``, ``sample_tokens``,
``_input_fits_in_drafter``, ``take_draft_token_ids``, ``input_batch``; ``EngineCore.post_step``;
``ModelRunnerOutput`` is pickled whole, attributes of ours included.
"""

from __future__ import annotations

from typing import Any

from rollout_server.drafter.verification import verify
from rollout_server.engine.vllm_plugin.drafts import DRAFTS_ATTRIBUTE


def verify_drafts(sample: Any) -> Any:
    """Wrap ``GPUModelRunner._sample``."""

    def wrapped(runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is None or runner.speculative_config is None:
            return sample(runner, logits, spec_decode_metadata)
        proposal = runner.drafter.take_proposal()
        if spec_decode_metadata.max_spec_len == 0:
            return sample(runner, logits, None)
        if runner.speculative_config.rejection_sample_method != "standard":
            # Benchmarks set acceptance by hand; a serving configuration cannot ask for this.
            return sample(runner, logits, spec_decode_metadata)
        batch = runner.input_batch
        batch.update_async_output_token_ids()
        if runner.use_async_scheduling and runner._draft_token_req_ids is not None:
            drafts, _ = runner._get_draft_token_ids_cpu()
            batch.update_async_spec_token_ids(drafts)
        return verify(
            logits,
            spec_decode_metadata.draft_token_ids,
            spec_decode_metadata.num_draft_tokens,
            batch.sampling_metadata,
            proposal,
            batch.req_ids,
        )

    return wrapped


def tell_drafter_what_was_sampled(propose: Any) -> Any:
    """Wrap ``GPUModelRunner.propose_draft_token_ids``."""

    def wrapped(runner: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any) -> Any:
        runner.drafter.sampled_token_ids_BJ = sampled_token_ids
        return propose(runner, scheduler_output, sampled_token_ids, *args)

    return wrapped


def send_drafts_with_output(sample_tokens: Any) -> Any:
    """Wrap ``GPUModelRunner.sample_tokens``."""

    def wrapped(runner: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(runner, *args, **kwargs)
        if not runner.use_async_scheduling and output is not None:
            drafts = runner.take_draft_token_ids()
            if drafts is not None:
                setattr(output, DRAFTS_ATTRIBUTE, drafts)
        return output

    return wrapped


def drafts_came_with_output(post_step: Any) -> Any:
    """Wrap ``EngineCore.post_step``, which would ask the workers for drafts."""

    def wrapped(core: Any, model_executed: bool) -> None:
        # An engine that slipstream did not start has vLLM's own scheduler: leave it as it is.
        if not getattr(core.scheduler, "takes_drafts_from_output", False):
            post_step(core, model_executed)

    return wrapped


def draft_to_the_end_of_the_context(runner: Any, common_attn_metadata: Any) -> bool:
    """Replaces ``GPUModelRunner._input_fits_in_drafter``."""
    return common_attn_metadata is not None
