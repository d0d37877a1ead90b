"""How far a drafter may fall behind the weights it drafts for. Pure.

A stale drafter is safe: verification holds every draft against the distribution it really came
from. It only drafts worse, and at the learning rates of RL a few pushes hardly change what int4 or
int8 rounds to.
"""

from __future__ import annotations


def is_rebuild_due(target_version: int, drafter_version: int, requantize_every: int) -> bool:
    """Whether the drafter must be rebuilt before it may draft for these weights.

    Example: with ``requantize_every`` 2 a drafter of version 4 drafts for versions 4 and 5; version
    6 rebuilds it.
    """
    return target_version - drafter_version >= requantize_every
