"""How many samples of a group go to a worker at once. Pure.

A frame costs both processes the same whether it holds one sample or many, so quick rewards get many
in one. Slow rewards get one each, since a sample that waits inside a frame cannot go to a worker
that is idle. What tells the two apart is how long samples of the reward took lately.
"""

from __future__ import annotations

from rollout_server.scoring.frames import SLICE_S

MAX_BATCH_SAMPLES = 64
MAX_BATCH_CHARS = 1024 * 1024
"""Of completions in one frame; at most 12 bytes each as JSON, so far below ``MAX_FRAME_BYTES``. A
longer one goes alone."""


class RewardPace:
    """Estimates by reward; up at once, down by half, so that one slow sample is enough."""

    def __init__(self) -> None:
        self._estimates_s: dict[str, float] = {}

    def observe(self, name: str, duration_s: float) -> None:
        """Learn from one sample."""
        known_s = self._estimates_s.get(name, 0.0)
        self._estimates_s[name] = max(duration_s, (known_s + duration_s) / 2)

    def num_samples(self, name: str) -> int:
        """As many as should take ``SLICE_S`` together; one of a reward that was never seen."""
        estimate_s = self._estimates_s.get(name)
        if estimate_s is None:
            return 1
        if estimate_s * MAX_BATCH_SAMPLES <= SLICE_S:
            return MAX_BATCH_SAMPLES
        return max(1, int(SLICE_S / estimate_s))
