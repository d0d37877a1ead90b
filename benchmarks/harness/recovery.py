"""How long a scheduler chose badly after something had changed. Pure.

Every recorded choice is judged with hindsight: by the calibrated cost model, the step's own load
and the acceptance that held after the event. A choice is bad where some draft length would have
made at least ``TOLERANCE`` more tokens per second. Counting mere changes of the draft length would
not do: a batch that drains asks for other lengths all the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.speculation.acceptance import mean_acceptance_lengths
from rollout_server.speculation.cost_model import CostModel
from shared.schemas.speculation import SpeculationStep
from shared.types import SpeculationReason

TOLERANCE = 0.05
"""The scheduler leaves a choice for one that is 1 to 2 % better; the rest is for what hindsight
does not know: its cost model is the calibrated one, without the corrections learned since."""
SETTLING_S = 10.0
"""Looked at after the event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hindsight:
    """What held after the event."""

    cost_model: CostModel
    acceptance_per_pos: tuple[float, ...]  # [max draft length], given the ones before

    def shortfall(self, step: SpeculationStep) -> float:
        """By how much the best draft length would have made more tokens per second: 0 or more."""
        requests = max(step.num_running_reqs, 1)
        lengths = mean_acceptance_lengths(self.acceptance_per_pos)
        rates = [
            length / self.cost_model.steady_step_s(requests, step.num_kv_tokens, k)
            for k, length in enumerate(lengths)
        ]
        return max(rates) / rates[step.num_speculative_tokens] - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """After one event."""

    last_bad_s: float
    """Until the last choice that hindsight calls bad; 0 where there was none."""
    bad_s: float
    """Seconds under such choices, in all."""
    last_change_s: float
    """Until the last change of the draft length, good or bad."""


def recovery(
    steps: Sequence[SpeculationStep], event_unix_s: float, until_unix_s: float, hindsight: Hindsight
) -> Recovery:
    """Judge the choices of the seconds after an event. Trials are left out: they are meant to be
    worse, bounded in number, and stop by themselves.

    Args:
        steps: every switch, and samples in between.
        until_unix_s: when something else changed; at most ``SETTLING_S`` are looked at.
    """
    end_s = min(until_unix_s - event_unix_s, SETTLING_S)
    last_bad_s = bad_s = last_change_s = 0.0
    previous: SpeculationStep | None = None
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if step.reason is SpeculationReason.EXPLORING:
            continue
        began_s = step.time_s - event_unix_s
        ended_s = end_s if after is None else min(after.time_s - event_unix_s, end_s)
        changed = (
            previous is not None and previous.num_speculative_tokens != step.num_speculative_tokens
        )
        previous = step
        if not 0 < began_s < end_s:
            continue
        if changed:
            last_change_s = began_s
        if hindsight.shortfall(step) >= TOLERANCE:
            last_bad_s = ended_s
            bad_s += ended_s - began_s
    return Recovery(last_bad_s=last_bad_s, bad_s=bad_s, last_change_s=last_change_s)
