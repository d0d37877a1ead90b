"""vLLM scheduler that asks the speculation controller for a draft length once per step.

The order within one ``schedule()``: facts are gathered and the controller decides; KV slots are
allocated with room for exactly that many drafts, so that a step without drafts takes not one block
more than plain decoding; the decision is confirmed with the occupancy that came of it. Where blocks
are so few that drafts could take one that plain decoding will need, the step drafts nothing and
drafts not yet verified are given up: speculation never causes a preemption.

Also keys the prefix cache by weight version, so that KV computed under old weights is never found
by a request that starts, or restarts, under new ones.

Leans on (vLLM 0.32.0): ``Scheduler`` (CPU, where vLLM schedules synchronously) and
``AsyncScheduler`` (CUDA); ``Scheduler.dynamic_sd_lookup``, read once per ``schedule()`` as
``lookup[num_scheduled_requests]`` after KV slots were allocated;
``Scheduler.num_lookahead_tokens``, read at every allocation; ``Request.spec_token_ids``;
``KVCacheManager.block_pool``; ``Scheduler._free_request``;
``Scheduler.make_spec_decoding_stats``; ``Scheduler.update_from_output`` and
``update_draft_token_ids``, called after it; ``Request.cache_salt``, ``block_hashes`` and
``update_block_hashes``; ``Scheduler._preempt_request``; ``Request.spec_decode_metrics``;
``Scheduler._update_request_with_output``, called right after ``make_spec_decoding_stats``.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from rollout_server.drafter.lag import WeightVersions
from rollout_server.engine.vllm_plugin.drafts import DRAFTS_ATTRIBUTE
from rollout_server.engine.vllm_plugin.settings import plugin_settings
from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.driver import SpeculationDriver
from rollout_server.speculation.request_drafts import RequestDrafts
from rollout_server.speculation.room import draft_room, useful_draft_length
from rollout_server.speculation.step_clock import StepClock
from rollout_server.speculation.steps import EngineLoadSample, SpeculationDecision, StepShape
from rollout_server.speculation.token_origins import OriginNotes
from shared.schemas.speculation import EngineSpeculation, SpeculationPatch
from shared.types import SpeculationMode

FEW_REQUESTS = 32
"""Up to here it is worth a look at each what tokens are left to it."""


class _DraftLengthLookup:
    """Stands where vLLM keeps its batch-size table; indexing it gives this step's decision."""

    def __init__(self, scheduler: _SlipstreamScheduling) -> None:
        self._scheduler = scheduler

    def __getitem__(self, num_scheduled_reqs: int) -> int:
        return self._scheduler.confirm_draft_length()


class _SlipstreamScheduling(Scheduler):
    """What both schedulers below have in common. Cooperative: comes first in their bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = plugin_settings(self.vllm_config)
        version = settings.initial_weight_version
        self.versions = WeightVersions(target=version, drafter=version)
        self._requantize_every = settings.drafter.requantize_every
        self.num_generation_tokens = 0
        self.num_prompt_tokens = 0
        self.num_preemptions = 0
        self._num_kv_blocks = self.kv_cache_manager.block_pool.num_gpu_blocks
        self.speculation = SpeculationDriver(
            settings.engine_id,
            settings.speculation,
            kv_capacity_tokens=self._num_kv_blocks * self.block_size,
        )
        self._step_clock = StepClock()
        self._decided: tuple[EngineLoadSample, SpeculationDecision] | None = None
        self._request_drafts = RequestDrafts()
        self._origin_notes = OriginNotes()
        if self.num_spec_tokens > 0:
            self.dynamic_sd_lookup = _DraftLengthLookup(self)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if self.num_spec_tokens == 0:
            return super().schedule(*args, **kwargs)
        begun_s = time.monotonic()
        self._decide()
        output = super().schedule(*args, **kwargs)
        self._step_clock.begin(self._shape_of(output), begun_s)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        now_s = time.monotonic()
        finished = self._step_clock.finish(now_s)
        if finished is not None:
            self.speculation.finish_step(*finished, now_s)
        return outputs

    def _decide(self) -> None:
        """Decide for the step about to be scheduled, and reserve slots for its drafts only."""
        num_reqs = len(self.running)
        max_drafts = self._room_for_drafts()
        if max_drafts == 0:
            self._give_up_drafts()
        sample = EngineLoadSample(
            time_s=time.monotonic(),
            kv_cache_usage=self.kv_cache_manager.usage,
            num_running_reqs=num_reqs,
            num_waiting_reqs=len(self.waiting),
            drafter_is_current=self.versions.may_draft(self._requantize_every),
            # Those still prefilling decode within a step or two, before drafts are verified.
            num_decode_reqs=num_reqs,
            num_kv_tokens=sum([request.num_computed_tokens for request in self.running]),
            max_draft_tokens=min(max_drafts, self._longest_useful_draft()),
        )
        decision = self.speculation.decide(sample)
        self._decided = sample, decision
        self.num_lookahead_tokens = decision.num_speculative_tokens

    def _room_for_drafts(self) -> int:
        """Draft length that can take no block that plain decoding will need."""
        limit: int = self.num_spec_tokens
        if self.speculation.controller.policy.mode is SpeculationMode.OFF:
            return limit  # nothing will be drafted; the reason to report is the mode
        waiting_tokens = self.waiting.peek_request().num_tokens if self.waiting else 0
        return draft_room(
            limit,
            num_free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks(),
            block_size=self.block_size,
            num_running_reqs=len(self.running),
            num_waiting_tokens=waiting_tokens,
        )

    def _longest_useful_draft(self) -> int:
        """Asked only while few run: with many, some request has tokens left."""
        limit: int = self.num_spec_tokens
        if not 0 < len(self.running) <= FEW_REQUESTS:
            return limit
        most_left = max([r.max_tokens - r.num_output_tokens for r in self.running])
        return useful_draft_length(limit, most_left)

    def _give_up_drafts(self) -> None:
        for request in self.running:
            if request.spec_token_ids:
                request.spec_token_ids = []

    def confirm_draft_length(self) -> int:
        """This step's draft length, recorded."""
        assert self._decided is not None, "schedule() decides before it allocates"
        sample, decision = self._decided
        confirmed = self.speculation.confirm(
            sample, decision, self.kv_cache_manager.usage, time.time()
        )
        return confirmed.num_speculative_tokens

    def _shape_of(self, output: Any) -> StepShape | None:
        """What the scheduled step computes; None if nothing."""
        num_reqs = len(output.num_scheduled_tokens)
        if num_reqs == 0:
            return None
        verified = sum(map(len, output.scheduled_spec_decode_tokens.values()))
        num_prefill_tokens = output.total_num_scheduled_tokens - num_reqs - verified
        num_decode_reqs = num_reqs
        if num_prefill_tokens:
            # More tokens than drafts explain: somebody prefills.
            drafts = output.scheduled_spec_decode_tokens
            num_decode_reqs = sum(
                tokens == 1 + len(drafts.get(request_id, ()))
                for request_id, tokens in output.num_scheduled_tokens.items()
            )
            num_prefill_tokens = output.total_num_scheduled_tokens - num_decode_reqs - verified
        assert self._decided is not None
        return StepShape(
            num_decode_reqs=num_decode_reqs,
            num_verified_tokens=verified,
            num_prefill_tokens=num_prefill_tokens,
            num_kv_tokens=self._decided[0].num_kv_tokens,
            num_speculative_tokens=output.num_spec_tokens_to_schedule,
            num_drafting_reqs=num_reqs,
        )

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Drafts that cannot be, or are not worth being, verified: trim them."""
        worthwhile = self._request_drafts.worthwhile_lengths(
            draft_token_ids.req_ids,
            max(map(len, draft_token_ids.draft_token_ids), default=0),
            self.speculation.controller,
            num_kv_tokens=self._decided[0].num_kv_tokens if self._decided else 0,
        )
        for index, (request_id, drafts) in enumerate(
            zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)
        ):
            request = self.requests.get(request_id)
            if request is not None:
                # Verification gives one token more than it has drafts.
                del drafts[max(request.max_tokens - request.num_output_tokens - 1, 0) :]
                if worthwhile is not None:
                    del drafts[worthwhile[index] :]
        super().update_draft_token_ids(draft_token_ids)

    def patch_speculation(self, patch: SpeculationPatch) -> None:
        """Take effect at the next step."""
        self.speculation.patch(patch)

    def set_cost_model(self, model: CostModel, name: str) -> None:
        """Use this calibration from the next step on."""
        self.speculation.set_cost_model(model, name)

    def report_speculation(self, since_step: int) -> EngineSpeculation:
        return self.speculation.report(since_step, self.kv_cache_manager.usage)

    def set_weight_versions(self, versions: WeightVersions) -> None:
        """Called inside the pause of a commit, after the target was replaced, and once the drafter
        was, inside that pause or later."""
        is_change = (versions.target, versions.drafter) != (
            self.versions.target,
            self.versions.drafter,
        )
        # What drafts are worth changes with the first that are made of the new pair.
        if is_change and not versions.is_rebuilding:
            self.speculation.weights_changed()
        self.versions = versions
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
            f"{salt if separator else request.cache_salt or ''}@v{self.versions.target}"
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
            self.speculation.count_draft(num_draft_tokens, num_accepted_tokens)
            self._origin_notes.verified(request_id, num_draft_tokens, num_accepted_tokens)
            if self.speculation.controller.policy.per_request:
                self._request_drafts.count(request_id, num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._request_drafts.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _update_request_with_output(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        new_token_ids, stopped = super()._update_request_with_output(request, *args, **kwargs)
        self.num_generation_tokens += len(new_token_ids)
        self._origin_notes.given(request, len(new_token_ids))
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
