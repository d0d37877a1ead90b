"""The running batch of a simulated engine: what each request holds, computes and yields. Pure.

Arrays have one entry per running request, in the order of admission; the last is preempted first,
and loses all of its KV, as in vLLM. A request *prefills* while it knows more than one token whose
KV is missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout_server.speculation.simulated_load import SimulatedRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedMemory:
    """What limits a batch."""

    num_kv_blocks: int
    block_size: int = 16
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRows:
    """Rows of one target pass, [num_running]."""

    rows_R: np.ndarray
    samples_R: np.ndarray
    """Whether the request has all of its KV after the pass, and so gets a token."""
    drafts_R: np.ndarray
    num_prefill_tokens: int
    num_decode_reqs: int


FIELDS = ("known", "computed", "left", "drafts", "blocks")


class SimulatedBatch:
    """Requests that run, and those that wait."""

    def __init__(self, memory: SimulatedMemory) -> None:
        self._memory = memory
        self._waiting: deque[tuple[int, int]] = deque()
        """Tokens known and tokens left to generate, in the order in which they are let in."""
        empty = np.zeros(0, dtype=np.int64)
        self.known = self.computed = self.left = self.drafts = self.blocks = empty
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self.known)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_kv_tokens(self) -> int:
        return int(self.computed.sum())

    @property
    def num_free_blocks(self) -> int:
        return self._memory.num_kv_blocks - int(self.blocks.sum())

    @property
    def usage(self) -> float:
        return float(self.blocks.sum()) / self._memory.num_kv_blocks

    @property
    def num_first_waiting_tokens(self) -> int:
        return self._waiting[0][0] if self._waiting else 0

    def arrive(self, requests: Sequence[SimulatedRequest]) -> None:
        self._waiting.extend((r.num_prompt_tokens, r.num_output_tokens) for r in requests)

    def give_up_drafts(self) -> None:
        self.drafts = np.zeros_like(self.drafts)

    def schedule(self, num_lookahead_tokens: int) -> ScheduledRows:
        """Allocate a step's KV slots, drafts to come included; let waiting requests in.

        Raises:
            ValueError: a request alone is larger than the KV cache.
        """
        rows_R = self._rows()
        while True:
            held_R = self._blocks_for(self.computed + rows_R + num_lookahead_tokens)
            held_R = np.maximum(held_R * (rows_R > 0), self.blocks)
            if held_R.sum() <= self._memory.num_kv_blocks:
                break
            if self.num_running == 1:
                raise ValueError(
                    f"{self.known[0]} tokens need {held_R[0]} KV blocks of "
                    f"{self._memory.num_kv_blocks}: give the simulated engine more memory"
                )
            self._preempt_last()
            rows_R = self._rows()
        self.blocks = held_R
        rows_R = self._admit(rows_R, num_lookahead_tokens)
        if not rows_R.any():
            raise ValueError(
                f"a request of {self.num_first_waiting_tokens} tokens does not fit into "
                f"{self._memory.num_kv_blocks} KV blocks: give the simulated engine more memory"
            )
        missing_R = self.known - self.computed
        decodes_R = (missing_R == 1) & (rows_R > 0)
        verified_R = np.where(decodes_R, self.drafts, 0)
        return ScheduledRows(
            rows_R=rows_R,
            samples_R=(rows_R >= missing_R) & (rows_R > 0),
            drafts_R=verified_R,
            num_prefill_tokens=int((rows_R * ~decodes_R).sum()),
            num_decode_reqs=int(decodes_R.sum()),
        )

    def advance(self, scheduled: ScheduledRows, accepted_R: np.ndarray, num_new_drafts: int) -> int:
        """The pass is over; tokens it yielded."""
        samples_R = scheduled.samples_R
        gained_R = np.where(samples_R, np.minimum(accepted_R + 1, self.left), 0)
        self.computed = np.where(
            samples_R, self.known + gained_R - 1, self.computed + scheduled.rows_R
        )
        self.known = self.known + gained_R
        self.left = self.left - gained_R
        self.drafts = np.where(samples_R, np.minimum(num_new_drafts, self.left - 1), 0)
        if not self.left.all():
            self._keep(self.left > 0)
        return int(gained_R.sum())

    def _rows(self) -> np.ndarray:
        """Rows each running request gets within the token budget, first come first served."""
        rows_R = self.known - self.computed + self.drafts
        budget = self._memory.max_num_batched_tokens
        if rows_R.sum() > budget:
            before_R = np.cumsum(rows_R) - rows_R
            rows_R = np.clip(budget - before_R, 0, rows_R)
            # Drafts that fall out of the budget are not verified.
            self.drafts = np.clip(rows_R - (self.known - self.computed), 0, self.drafts)
        return rows_R

    def _admit(self, rows_R: np.ndarray, num_lookahead_tokens: int) -> np.ndarray:
        memory = self._memory
        if not self._waiting or self.num_running >= memory.max_num_seqs:
            return rows_R
        budget = memory.max_num_batched_tokens - int(rows_R.sum())
        free = self.num_free_blocks
        entered: list[tuple[int, int, int, int]] = []
        while self._waiting and budget > 0:
            if self.num_running + len(entered) >= memory.max_num_seqs:
                break
            known, left = self._waiting[0]
            rows = min(known, budget)
            needed = -(-(rows + num_lookahead_tokens) // memory.block_size)
            if needed > free:
                break
            self._waiting.popleft()
            budget, free = budget - rows, free - needed
            entered.append((known, left, rows, needed))
        if not entered:
            return rows_R
        known_E, left_E, rows_E, blocks_E = np.array(entered, dtype=np.int64).T
        zeros_E = np.zeros(len(entered), dtype=np.int64)
        new = {
            "known": known_E,
            "computed": zeros_E,
            "left": left_E,
            "drafts": zeros_E,
            "blocks": blocks_E,
        }
        for name in FIELDS:
            setattr(self, name, np.concatenate([getattr(self, name), new[name]]))
        return np.concatenate([rows_R, rows_E])

    def _preempt_last(self) -> None:
        self._waiting.appendleft((int(self.known[-1]), int(self.left[-1])))
        self.num_preemptions += 1
        keep_R = np.ones(self.num_running, dtype=bool)
        keep_R[-1] = False
        self._keep(keep_R)

    def _keep(self, keep_R: np.ndarray) -> None:
        for name in FIELDS:
            setattr(self, name, getattr(self, name)[keep_R])

    def _blocks_for(self, tokens_R: np.ndarray) -> np.ndarray:
        return -(-tokens_R // self._memory.block_size)
