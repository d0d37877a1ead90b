"""Watches every write to a vLLM worker's KV cache, step by step (vLLM 0.32.0, CPU).

Legend: B blocks, S slots of a block, E elements of a slot (keys and values of all heads).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import _custom_ops as ops

POISON = 1e4
"""Finite, since attention multiplies what it masks by zero; large enough to change any output."""
MAX_MESSAGES = 20


@dataclass(kw_only=True, slots=True)
class KvReport:
    """What was seen since the guard was installed."""

    num_steps: int = 0
    num_target_slots: int = 0
    """Slots that steps may write for tokens they verify or prefill, summed over layers."""
    num_provisional_slots: int = 0
    """Slots beyond those that were really written: by the drafter."""
    num_poisoned_slots: int = 0
    num_stray_slots: int = 0
    """Slots written outside of those reserved for a request of the step."""
    num_foreign_slots: int = 0
    """Slots that the drafter wrote for a request and that are not reserved for that request."""
    messages: list[str] = field(default_factory=list)


def slot_order(kv_BX: torch.Tensor, block_size: int, isa: str) -> torch.Tensor:
    """Element indices of a block sorted by slot: [S * E]. Found by writing, not by assumption.

    CPU attention packs keys within a block, so a slot's elements do not lie together.
    """
    _, num_heads, _, two_head_sizes = kv_BX.shape
    scratch = torch.full_like(kv_BX[:1], -1.0)
    keys, values = scratch.view(1, num_heads, block_size * 2, -1).chunk(2, dim=2)
    slots = torch.arange(block_size)
    written = slots.to(scratch.dtype)[:, None, None].expand(-1, num_heads, two_head_sizes // 2)
    written = written.contiguous()
    ops.cpu_attn_reshape_and_cache(written, written.clone(), keys, values, slots, isa)
    slot_of_element = scratch.reshape(-1)
    counts = torch.bincount(slot_of_element.long(), minlength=block_size)
    assert bool((slot_of_element >= 0).all()), "some elements of a block belong to no slot"
    assert bool((counts == counts[0]).all()), "slots of different sizes"
    return torch.argsort(slot_of_element, stable=True)


class KvGuard:
    """Compares the whole cache before and after each step with what the step may write.

    A step may write, for each of its requests and in that request's own blocks, the positions it
    computes (prompt chunk, newest token and drafts to verify) and as many after them as it drafts.
    Everything else has to stay bit for bit what it was: blocks of other requests, of requests that
    are not in this step, of finished ones in the prefix cache, free blocks and the null block.

    Bytes do not tell on whose behalf a slot was written, so the drafter's calls of the kernel that
    writes KV are watched as well: row r of a draft pass may write request r's own slots only.
    """

    def __init__(self, runner: Any, *, poison: bool) -> None:
        self.report = KvReport()
        self.computed: dict[str, tuple[list[int], int]] = {}
        """Of every request ever seen: its blocks, and how many positions hold valid KV."""
        self.num_positions = 0
        """The target was scheduled to compute."""
        self.plant_stray_write_at: tuple[int, int] | None = None
        self._finished: dict[str, torch.Tensor] = {}
        self._runner = runner
        self._poison = poison
        caches = {cache.data_ptr(): cache for cache in runner.kv_caches}
        self._caches = list(caches.values())
        self._block_size = self._caches[0].shape[2]
        layers = runner.compilation_config.static_forward_context
        isa = next(layer.isa for layer in layers.values() if hasattr(layer, "isa"))
        self._order = slot_order(self._caches[0], self._block_size, isa)
        self._before: list[torch.Tensor] = []
        self._scheduled: Any = None
        self._execute_model = runner.execute_model
        self._sample_tokens = runner.sample_tokens
        self._reserved: dict[str, set[int]] = {}
        self._is_drafting = False
        self._propose = runner.drafter.propose
        self._write = ops.cpu_attn_reshape_and_cache
        runner.execute_model = self._before_step
        runner.sample_tokens = self._after_step
        runner.drafter.propose = self._watched_propose
        ops.cpu_attn_reshape_and_cache = self._watched_write

    def uninstall(self) -> None:
        ops.cpu_attn_reshape_and_cache = self._write
        self._runner.drafter.propose = self._propose
        self._runner.execute_model = self._execute_model
        self._runner.sample_tokens = self._sample_tokens

    def slots(self, cache: torch.Tensor) -> torch.Tensor:
        """A copy as [B, S, E]."""
        return cache.view(cache.shape[0], -1)[:, self._order].view(
            cache.shape[0], self._block_size, -1
        )

    def _before_step(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            if request_id in self.computed:
                # Its blocks may have new owners already, who have not written to them yet.
                self._finished[request_id] = self._valid_kv(request_id)
        self._before = [cache.clone() for cache in self._caches]
        self._scheduled = scheduler_output
        self._reserved = {}
        return self._execute_model(scheduler_output, *args, **kwargs)

    def _after_step(self, *args: Any, **kwargs: Any) -> Any:
        result = self._sample_tokens(*args, **kwargs)
        if self._scheduled is not None and self._scheduled.total_num_scheduled_tokens:
            if self.plant_stray_write_at is not None:
                block, slot = self.plant_stray_write_at
                self._fill(block, [slot], 0.5)
            self._check(self._scheduled)
            self._note_computed(self._scheduled, result)
            self.num_positions += self._scheduled.total_num_scheduled_tokens
        self._scheduled = None
        return result

    def _watched_propose(self, *args: Any, **kwargs: Any) -> Any:
        self._is_drafting = True
        try:
            return self._propose(*args, **kwargs)
        finally:
            self._is_drafting = False

    def _watched_write(
        self,
        key: Any,
        value: Any,
        key_cache: Any,
        value_cache: Any,
        slots: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if self._is_drafting:
            self._check_owners(slots.tolist())
        self._write(key, value, key_cache, value_cache, slots, *args, **kwargs)

    def _check_owners(self, slot_of_row: list[int]) -> None:
        # Rows after the requests are padding, and have negative slots as what is past the context.
        for request_id, slot in zip(self._runner.input_batch.req_ids, slot_of_row, strict=False):
            if slot >= 0 and slot not in self._reserved_slots(request_id):
                self.report.num_foreign_slots += 1
                self._say(f"step {self.report.num_steps + 1}: slot {slot} is not of {request_id}")

    def _reserved_slots(self, request_id: str) -> set[int]:
        """What the running step may write for a request, as vLLM numbers slots."""
        if request_id not in self._reserved:
            scheduled, blocks = self._scheduled, self._blocks(request_id)
            first = self._first_positions(scheduled)[request_id]
            end = first + scheduled.num_scheduled_tokens[request_id]
            end = min(end + scheduled.num_spec_tokens_to_schedule, len(blocks) * self._block_size)
            self._reserved[request_id] = {
                blocks[position // self._block_size] * self._block_size
                + position % self._block_size
                for position in range(first, end)
            }
        return self._reserved[request_id]

    def _say(self, message: str) -> None:
        if len(self.report.messages) < MAX_MESSAGES:
            self.report.messages.append(message)

    def _first_positions(self, scheduled: Any) -> dict[str, int]:
        first = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        first.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return first

    def _blocks(self, request_id: str) -> list[int]:
        (blocks,) = self._runner.requests[request_id].block_ids
        return list(blocks)

    def _check(self, scheduled: Any) -> None:
        shape = (self._caches[0].shape[0], self._block_size)
        target = torch.zeros(shape, dtype=torch.bool)
        provisional = torch.zeros(shape, dtype=torch.bool)
        first_positions = self._first_positions(scheduled)
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            blocks = self._blocks(request_id)
            first = first_positions[request_id]
            end = first + num_tokens
            drafted = end + scheduled.num_spec_tokens_to_schedule
            for position in range(first, min(drafted, len(blocks) * self._block_size)):
                block = blocks[position // self._block_size]
                chosen = target if position < end else provisional
                chosen[block, position % self._block_size] = True
        for block in getattr(scheduled, "new_block_ids_to_zero", None) or []:
            target[block] = True
        report = self.report
        report.num_steps += 1
        for layer, (before, after) in enumerate(zip(self._before, self._caches, strict=True)):
            different = before.view(torch.int32) != after.view(torch.int32)
            changed = self.slots(different).any(dim=-1)
            report.num_target_slots += int(target.sum())
            report.num_provisional_slots += int((changed & provisional & ~target).sum())
            stray = changed & ~target & ~provisional
            report.num_stray_slots += int(stray.sum())
            for block, slot in stray.nonzero().tolist():
                self._say(f"step {report.num_steps}, layer {layer}: block {block} slot {slot}")

    def _note_computed(self, scheduled: Any, result: Any) -> None:
        """Count valid positions; overwrite the rest of each request's blocks if asked to."""
        first_positions = self._first_positions(scheduled)
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            sampled = result.sampled_token_ids[result.req_id_to_index[request_id]]
            drafts = scheduled.scheduled_spec_decode_tokens.get(request_id, ())
            num_rejected = len(drafts) - (len(sampled) - 1) if drafts else 0
            blocks = self._blocks(request_id)
            valid = first_positions[request_id] + num_tokens - num_rejected
            self.computed[request_id] = (blocks, valid)
            if self._poison:
                for position in range(valid, len(blocks) * self._block_size):
                    block = blocks[position // self._block_size]
                    self._fill(block, [position % self._block_size], POISON)
                    self.report.num_poisoned_slots += 1

    def _fill(self, block: int, slots: list[int], value: float) -> None:
        elements = self._order.view(self._block_size, -1)[slots].reshape(-1)
        for cache in self._caches:
            cache.view(cache.shape[0], -1)[block, elements] = value

    def valid_kv(self) -> dict[str, torch.Tensor]:
        """Of every request seen, when it finished: [layers, valid positions, E]."""
        rest = self.computed.keys() - self._finished.keys()
        return {**self._finished, **{name: self._valid_kv(name) for name in rest}}

    def _valid_kv(self, request_id: str) -> torch.Tensor:
        blocks, valid = self.computed[request_id]
        return torch.stack(
            [self.slots(cache)[blocks].flatten(0, 1)[:valid] for cache in self._caches]
        )
