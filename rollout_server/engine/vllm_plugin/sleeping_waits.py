"""On CPU, vLLM's processes of an engine sleep while they wait for each other.

The core waits for its workers, and they for it, in ``SpinCondition.wait``: for a second after the
latest message it looks again and again, and yields the processor in between. Where a GPU computes,
nobody else wants that processor. Here another engine, a trainer or the server does, and what
computes is interrupted for every look. Leans on vLLM 0.32.0:
``vllm.distributed.device_communicators.shm_broadcast.SpinCondition`` (``busy_loop_s``, ``wait``,
``record_read``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LONGEST_SLEEP_MS = 1000
"""Then it looks by itself: a wake-up that got lost costs no more (vLLM: 5 s)."""


def sleep_after_first_message(record_read: Callable[[Any], None]) -> Callable[[Any], None]:
    """``SpinCondition.record_read``. Until the first message it spins as ever: the socket of the
    wake-ups may still be connecting."""

    def record(condition: Any) -> None:
        record_read(condition)
        condition.busy_loop_s = 0.0

    return record


def sleep_for_a_while(wait: Callable[..., None]) -> Callable[..., None]:
    """``SpinCondition.wait``, which returns without a message at the latest after
    ``LONGEST_SLEEP_MS``: its caller looks, and waits again."""

    def wait_for_a_while(condition: Any, timeout_ms: int | None = None) -> None:
        longest_ms = LONGEST_SLEEP_MS if timeout_ms is None else min(timeout_ms, LONGEST_SLEEP_MS)
        wait(condition, longest_ms)

    return wait_for_a_while
