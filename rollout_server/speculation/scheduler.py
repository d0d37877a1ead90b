"""vLLM scheduler that asks the speculation controller for a draft length once per step.

Also keys the prefix cache by weight version, so that KV computed under old weights is never found
by a request that starts, or restarts, under new ones.

Leans on (vLLM 0.32.0): ``Scheduler`` (CPU, where vLLM schedules synchronously) and
``AsyncScheduler`` (CUDA); ``Scheduler.dynamic_sd_lookup``, read once per ``schedule()`` as
``lookup[num_scheduled_requests]`` after KV slots were allocated;
``Scheduler.make_spec_decoding_stats``; ``Scheduler.update_from_output`` and
``update_draft_token_ids``, called after it; ``Request.cache_salt``, ``block_hashes`` and
``update_block_hashes``; ``Scheduler._preempt_request``.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from rollout_server.drafter.lag import is_rebuild_due
from rollout_server.engine.vllm_plugin.drafts import DRAFTS_ATTRIBUTE
from rollout_server.engine.vllm_plugin.settings import plugin_settings
from rollout_server.speculation.controller import (
    EngineLoadSample,
    SpeculationController,
)
from rollout_server.speculation.policy import apply_patch, initial_policy
from rollout_server.speculation.recorder import SpeculationRecorder
from shared.schemas.speculation import EngineSpeculation, SpeculationPatch


class _DraftLengthLookup:
    """Stands where vLLM keeps its batch-size table; indexing it makes this step's decision."""

    def __init__(self, scheduler: _SlipstreamScheduling) -> None:
        self._scheduler = scheduler

    def __getitem__(self, num_scheduled_reqs: int) -> int:
        return self._scheduler.decide_draft_length()


class _SlipstreamScheduling(Scheduler):
    """What both schedulers below have in common. Cooperative: comes first in their bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = plugin_settings(self.vllm_config)
        self.target_version = settings.initial_weight_version
        self.drafter_version = settings.initial_weight_version
        self._requantize_every = settings.drafter.requantize_every
        self.num_generation_tokens = 0
        self.num_prompt_tokens = 0
        self.num_preemptions = 0
        self.speculation_controller = SpeculationController(initial_policy(settings.speculation))
        self.speculation_recorder = SpeculationRecorder(
            settings.engine_id,
            settings.speculation.history_size,
            settings.speculation.reserved_speculative_tokens,
        )
        if self.num_spec_tokens > 0:
            self.dynamic_sd_lookup = _DraftLengthLookup(self)

    def decide_draft_length(self) -> int:
        """This step's draft length, recorded."""
        sample = EngineLoadSample(
            kv_cache_usage=self.kv_cache_manager.usage,
            num_running_reqs=len(self.running),
            num_waiting_reqs=len(self.waiting),
            drafter_is_current=not is_rebuild_due(
                self.target_version, self.drafter_version, self._requantize_every
            ),
        )
        decision = self.speculation_controller.decide(sample)
        self.speculation_recorder.record_step(time.time(), sample, decision)
        return decision.num_speculative_tokens

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Drafts past a request's last token would be verified for nothing: trim them."""
        for request_id, drafts in zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        ):
            request = self.requests.get(request_id)
            if request is not None:
                # Verification gives one token more than it has drafts.
                del drafts[max(request.max_tokens - request.num_output_tokens - 1, 0) :]
        super().update_draft_token_ids(draft_token_ids)

    def patch_speculation(self, patch: SpeculationPatch) -> None:
        """Take effect at the next step."""
        controller = self.speculation_controller
        controller.set_policy(apply_patch(controller.policy, patch))

    def report_speculation(self, since_step: int) -> EngineSpeculation:
        return self.speculation_recorder.report(since_step, self.kv_cache_manager.usage)

    def set_weight_versions(self, target_version: int, drafter_version: int) -> None:
        """Called inside the pause of a commit, after target and drafter were replaced."""
        self.target_version = target_version
        self.drafter_version = drafter_version
        # Waiting requests will compute (all of) their KV under the new weights; running ones keep
        # the key their KV was computed under.
        for request in self.waiting:
            self._key_by_weight_version(request)

    def add_request(self, request: Request) -> None:
        self.num_prompt_tokens += request.num_prompt_tokens
        self._key_by_weight_version(request)
        super().add_request(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.num_preemptions += 1
        self._key_by_weight_version(request)

    def _key_by_weight_version(self, request: Request) -> None:
        """Salt the request's block hashes with the version its KV will be computed under.

        The salt enters the first block's hash and every later hash chains on it, so blocks of
        different versions can never be mistaken for each other.
        """
        salt, separator, _ = (request.cache_salt or "").rpartition("@v")
        request.cache_salt = (
            f"{salt if separator else request.cache_salt or ''}@v{self.target_version}"
        )
        request.block_hashes.clear()
        request.update_block_hashes()

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        if num_draft_tokens:
            self.speculation_recorder.record_draft(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def _update_request_with_output(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        new_token_ids, stopped = super()._update_request_with_output(request, *args, **kwargs)
        self.num_generation_tokens += len(new_token_ids)
        return new_token_ids, stopped


class SlipstreamScheduler(_SlipstreamScheduling):
    """``scheduler_cls`` of engines that schedule synchronously."""

    takes_drafts_from_output = True

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        drafts = getattr(model_runner_output, DRAFTS_ATTRIBUTE, None)
        if drafts is not None:
            self.update_draft_token_ids(drafts)
        return outputs


class SlipstreamAsyncScheduler(_SlipstreamScheduling, AsyncScheduler):
    """``scheduler_cls`` of engines that schedule one step ahead of the GPU."""
