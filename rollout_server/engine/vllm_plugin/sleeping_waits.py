"""On CPU, vLLM's processes of an engine sleep while they wait for each other.

The core waits for its workers, and they for it, in ``SpinCondition.wait``: for a second after the
latest message it looks again and again, and yields the processor in between. Where a GPU computes,
nobody else wants that processor. Here another engine, a trainer or the server does, and what
computes is interrupted for every look.

Who sleeps has to be woken. vLLM's wake-up is a message on a ZeroMQ socket that holds one at a time,
and it is dropped while the one before seems to be there still: a socket that sends takes notice of
what was read only once in a millisecond, unless it is asked for its events. So it is asked before
each wake-up. Leans on vLLM 0.32.0:
``vllm.distributed.device_communicators.shm_broadcast.SpinCondition`` (``busy_loop_s``,
``last_read``, ``local_notify_socket``, ``wait``, ``notify``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import zmq

SPIN_S = 0.002
"""Before it sleeps: being woken takes a tenth of that, which short steps of small models would pay
several times each."""
LONGEST_NAP_MS = 10
"""In the second in which vLLM would spin; then it looks by itself. A wake-up that is lost for all
that, or sent before the sockets are connected, costs no more."""


def nap_instead_of_spinning(wait: Callable[..., None]) -> Callable[..., None]:
    """``SpinCondition.wait``; its caller looks, and waits again."""

    def wait_asleep(condition: Any, timeout_ms: int | None = None) -> None:
        now_s = time.monotonic()
        if getattr(condition, "slipstream_waits_since_read_s", None) != condition.last_read:
            condition.slipstream_waits_since_read_s = condition.last_read
            condition.slipstream_sleeps_from_s = now_s + SPIN_S
        spin_s = condition.busy_loop_s
        if now_s <= condition.last_read + spin_s:
            if now_s < condition.slipstream_sleeps_from_s:
                wait(condition, timeout_ms)  # yields, and returns
                return
            timeout_ms = LONGEST_NAP_MS if timeout_ms is None else min(timeout_ms, LONGEST_NAP_MS)
        condition.busy_loop_s = 0.0
        try:
            wait(condition, timeout_ms)
        finally:
            condition.busy_loop_s = spin_s

    return wait_asleep


def notify_in_any_case(notify: Callable[[Any], None]) -> Callable[[Any], None]:
    """``SpinCondition.notify``, after the socket has taken notice of what was read."""

    def notify_now(condition: Any) -> None:
        condition.local_notify_socket.getsockopt(zmq.EVENTS)
        notify(condition)

    return notify_now
