"""One engine's rollouts in simulated time, under the very controller that real engines use. Pure.

A *true* cost model says what each step takes, give or take noise; the controller may believe
another one. The engine batches continuously as vLLM does: rows of running requests first, waiting
ones as budget and KV blocks allow, the last preempted where blocks run out, drafts verified one
step after they were made (``simulated_batch.py``). Each draft is accepted by chance, per position.

What it leaves out: the prefix cache (prompts are prefilled in full), the step by which an
asynchronous scheduler learns late, and everything between requests, such as reward computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout_server.speculation.controller import SpeculationController
from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.room import draft_room
from rollout_server.speculation.simulated_batch import (
    ScheduledRows,
    SimulatedBatch,
)
from rollout_server.speculation.simulated_load import SimulatedRequest
from rollout_server.speculation.simulation import (
    SimulatedEvent,
    SimulatedMachine,
    SimulatedStep,
    SimulationResult,
)
from rollout_server.speculation.steps import (
    EngineLoadSample,
    SpeculationDecision,
    StepObservation,
    StepShape,
)
from shared.schemas.speculation import SpeculationPolicy
from shared.types import SpeculationMode


def simulate(
    requests: Sequence[SimulatedRequest],
    machine: SimulatedMachine,
    policy: SpeculationPolicy,
    *,
    acceptance_per_pos: Sequence[float],
    believed: CostModel | None = None,
    max_draft_length: int | None = None,
    events: Sequence[SimulatedEvent] = (),
    until_s: float = float("inf"),
    seed: int = 0,
) -> SimulationResult:
    """Run the requests to their end, or until a time.

    Args:
        acceptance_per_pos: conditional acceptance of each draft position, the truth of it.
        believed: what the controller is given as calibration; None: nothing.
        max_draft_length: KV slots the engine reserves for drafts; None: the policy's length.
    """
    engine = _SimulatedEngine(
        requests,
        machine,
        policy,
        acceptance_per_pos,
        believed,
        max_draft_length or policy.num_speculative_tokens,
        events,
        seed,
    )
    while engine.time_s < until_s and engine.step():
        pass
    engine.result.time_s = engine.time_s
    engine.result.num_preemptions = engine.batch.num_preemptions
    return engine.result


class _SimulatedEngine:
    def __init__(
        self,
        requests: Sequence[SimulatedRequest],
        machine: SimulatedMachine,
        policy: SpeculationPolicy,
        acceptance_per_pos: Sequence[float],
        believed: CostModel | None,
        max_draft_length: int,
        events: Sequence[SimulatedEvent],
        seed: int,
    ) -> None:
        memory = machine.memory
        self._arrivals = sorted(requests, key=lambda request: -request.arrival_s)
        self._events = sorted(events, key=lambda event: -event.time_s)
        self._machine = machine
        self._max_draft_length = max_draft_length
        self._controller = SpeculationController(
            policy,
            max_draft_length=max_draft_length,
            kv_capacity_tokens=memory.num_kv_blocks * memory.block_size,
            cost_model=believed,
        )
        self._rng = np.random.default_rng(seed)
        self._slow_factor = 1.0
        self._survival = self._survivals(acceptance_per_pos)
        self.time_s = 0.0
        self.batch = SimulatedBatch(memory)
        self.result = SimulationResult()

    def step(self) -> bool:
        """One engine step; whether there was anything to do."""
        self._bring_up_to_date()
        batch = self.batch
        if not batch.num_running and not batch.num_waiting:
            if not self._arrivals:
                return False
            self.time_s = self._arrivals[-1].arrival_s
            return True
        sample = self._sample()
        decision = self._controller.decide(sample)
        scheduled = batch.schedule(decision.num_speculative_tokens)
        usage = batch.usage
        confirmed = self._controller.confirm(decision, usage)
        accepted_R, tried, accepted = self._verify(scheduled)
        shape = StepShape(
            num_decode_reqs=scheduled.num_decode_reqs,
            num_verified_tokens=int(scheduled.drafts_R.sum()),
            num_prefill_tokens=scheduled.num_prefill_tokens,
            num_kv_tokens=sample.num_kv_tokens,
            num_speculative_tokens=confirmed.num_speculative_tokens,
            num_drafting_reqs=int((scheduled.rows_R > 0).sum()),
        )
        duration_s = self._machine.cost_model.step_s(shape) * self._disturbance()
        num_tokens = batch.advance(scheduled, accepted_R, confirmed.num_speculative_tokens)
        self._record(len(accepted_R), confirmed, usage, duration_s, num_tokens)
        self.time_s += duration_s
        observation = StepObservation(
            shape=shape,
            duration_s=duration_s,
            num_tried_per_pos=tried,
            num_accepted_per_pos=accepted,
        )
        self._controller.observe(observation, self.time_s)
        return True

    def _bring_up_to_date(self) -> None:
        """Whatever has happened meanwhile."""
        arrived = []
        while self._arrivals and self._arrivals[-1].arrival_s <= self.time_s:
            arrived.append(self._arrivals.pop())
        self.batch.arrive(arrived)
        while self._events and self._events[-1].time_s <= self.time_s:
            event = self._events.pop()
            if event.slow_factor is not None:
                self._slow_factor = event.slow_factor
            if event.acceptance_per_pos is not None:
                self._survival = self._survivals(event.acceptance_per_pos)
            if event.weights_changed:
                self._controller.weights_changed()

    def _sample(self) -> EngineLoadSample:
        batch, memory = self.batch, self._machine.memory
        room = self._max_draft_length
        if self._controller.policy.mode is not SpeculationMode.OFF:
            room = draft_room(
                self._max_draft_length,
                num_free_blocks=batch.num_free_blocks,
                block_size=memory.block_size,
                num_running_reqs=batch.num_running,
                num_waiting_tokens=batch.num_first_waiting_tokens,
            )
        if room == 0:
            batch.give_up_drafts()
        return EngineLoadSample(
            time_s=self.time_s,
            kv_cache_usage=batch.usage,
            num_running_reqs=batch.num_running,
            num_waiting_reqs=batch.num_waiting,
            num_decode_reqs=batch.num_running,
            num_kv_tokens=batch.num_kv_tokens,
            max_draft_tokens=room,
        )

    def _verify(
        self, scheduled: ScheduledRows
    ) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
        """Accepted drafts per request, and drafts tried and accepted per position."""
        drafts_R, survival = scheduled.drafts_R, self._survival
        if not drafts_R.any():
            return np.zeros_like(drafts_R), (), ()
        # A draft survives if one draw per request is below its chance of surviving.
        draws_R = self._rng.random(len(drafts_R))
        accepted_R = np.minimum(len(survival) - np.searchsorted(survival[::-1], draws_R), drafts_R)
        size = self._max_draft_length
        accepted = _at_least(accepted_R, size)
        # Tried: every accepted draft, and the one after it if there was one.
        tried = _at_least(np.minimum(accepted_R + 1, drafts_R), size)
        return accepted_R, tried, accepted

    def _survivals(self, acceptance_per_pos: Sequence[float]) -> np.ndarray:
        """Chance that all drafts up to each position are accepted: the last figure goes on."""
        known = list(acceptance_per_pos[: self._max_draft_length])
        known += [known[-1]] * (self._max_draft_length - len(known))
        return np.cumprod(known)

    def _disturbance(self) -> float:
        machine = self._machine
        factor = self._slow_factor
        if machine.step_noise:
            factor *= float(self._rng.lognormal(0.0, machine.step_noise))
        if machine.stall_share and self._rng.random() < machine.stall_share:
            factor *= machine.stall_factor
        return factor

    def _record(
        self,
        num_running_reqs: int,
        decision: SpeculationDecision,
        usage: float,
        duration_s: float,
        num_tokens: int,
    ) -> None:
        self.result.num_tokens += num_tokens
        self.result.steps.append(
            SimulatedStep(
                time_s=self.time_s,
                duration_s=duration_s,
                num_running_reqs=num_running_reqs,
                kv_cache_usage=usage,
                num_speculative_tokens=decision.num_speculative_tokens,
                reason=decision.reason,
                num_tokens=num_tokens,
            )
        )


def _at_least(counts_R: np.ndarray, num_positions: int) -> tuple[int, ...]:
    """How many of ``counts_R`` reach 1, 2, ...: [num_positions]."""
    histogram = np.bincount(counts_R, minlength=num_positions + 1)
    reached = np.cumsum(histogram[::-1])[::-1]
    return tuple(int(count) for count in reached[1 : num_positions + 1])
