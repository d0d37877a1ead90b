"""How far a drafter may fall behind the weights it drafts for. Pure.

A stale drafter is safe: verification holds every draft against the distribution it really came
from. It only drafts worse, and at the learning rates of RL a few pushes hardly change what int4 or
int8 rounds to.
"""

from __future__ import annotations

from dataclasses import dataclass


def is_rebuild_due(target_version: int, drafter_version: int, requantize_every: int) -> bool:
    """Whether the drafter must be rebuilt before it may draft for these weights.

    Example: with ``requantize_every`` 2 a drafter of version 4 drafts for versions 4 and 5; version
    6 rebuilds it.
    """
    return target_version - drafter_version >= requantize_every


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightVersions:
    """What an engine computes with."""

    target: int
    drafter: int
    """Of its last rebuild that is done."""
    is_rebuilding: bool = False
    """The drafter is a mixture of versions, or about to be."""

    def may_draft(self, requantize_every: int) -> bool:
        """Whether the drafter is close enough to the target to be worth asking."""
        is_due = is_rebuild_due(self.target, self.drafter, requantize_every)
        return not self.is_rebuilding and not is_due
