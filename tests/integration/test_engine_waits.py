"""vLLM's processes of an engine wait for each other asleep, and are woken by what comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from rollout_server.engine.vllm_plugin import sleeping_waits

shm_broadcast = pytest.importorskip("vllm.distributed.device_communicators.shm_broadcast")

FOUND_S = 15.0
NEVER_MS = 60_000
"""Without a wake-up: longer than is waited for a message."""


class Reader:
    """The other end of a queue, in a thread of its own."""

    def __init__(self, writer: shm_broadcast.MessageQueue) -> None:
        self._pool = ThreadPoolExecutor(1)
        made = self._pool.submit(
            shm_broadcast.MessageQueue.create_from_handle, writer.export_handle(), 0
        )
        self.queue = made.result(timeout=30)

    def read(self) -> Future[tuple[object, float]]:
        """The next message, and the seconds of processor time that waiting for it took."""
        return self._pool.submit(self._read)

    def _read(self) -> tuple[object, float]:
        started = time.thread_time()
        message = self.queue.dequeue(timeout=60)
        return message, time.thread_time() - started

    def close(self) -> None:
        self._pool.shutdown()
        self.queue.shutdown()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[shm_broadcast.MessageQueue, Reader]]:
    condition = shm_broadcast.SpinCondition
    monkeypatch.setattr(condition, "wait", sleeping_waits.nap_instead_of_spinning(condition.wait))
    monkeypatch.setattr(condition, "notify", sleeping_waits.notify_in_any_case(condition.notify))
    writer = shm_broadcast.MessageQueue(1, 1, local_reader_ranks=[0])
    reader = Reader(writer)
    ready = reader._pool.submit(reader.queue.wait_until_ready)
    writer.wait_until_ready()
    ready.result(timeout=30)
    yield writer, reader
    reader.close()
    writer.shutdown()


def test_who_waits_for_a_message_takes_next_to_no_processor_time(
    ends: tuple[shm_broadcast.MessageQueue, Reader],
) -> None:
    writer, reader = ends
    first = reader.read()
    writer.enqueue("first")
    assert first.result(timeout=30)[0] == "first"
    second = reader.read()
    time.sleep(0.5)
    writer.enqueue("second")
    message, processor_s = second.result(timeout=30)
    assert message == "second"
    assert processor_s < 0.1, "half a second was waited, and vLLM spins for a whole one"


def test_every_wait_begins_awake_for_messages_that_come_soon(
    ends: tuple[shm_broadcast.MessageQueue, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = ends
    num_looks = 0

    def yield_processor() -> None:
        nonlocal num_looks
        num_looks += 1

    monkeypatch.setattr(shm_broadcast, "sched_yield", yield_processor)
    for number in range(3):
        before = num_looks
        message = reader.read()
        time.sleep(0.05)
        writer.enqueue(number)
        message.result(timeout=FOUND_S)
        assert num_looks > before


def test_a_message_whose_wake_up_was_lost_is_found_all_the_same(
    ends: tuple[shm_broadcast.MessageQueue, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = ends
    monkeypatch.setattr(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", NEVER_MS)
    monkeypatch.setattr(shm_broadcast.SpinCondition, "notify", lambda condition: None)
    for number in range(3):
        next_one = reader.read()
        time.sleep(0.1)
        writer.enqueue(number)
        assert next_one.result(timeout=FOUND_S)[0] == number


def test_messages_right_after_each_other_all_wake(
    ends: tuple[shm_broadcast.MessageQueue, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second within a millisecond of the first, and when that was read."""
    writer, reader = ends
    monkeypatch.setattr(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", NEVER_MS)
    monkeypatch.setattr(sleeping_waits, "LONGEST_NAP_MS", NEVER_MS)
    for number in range(50):
        first = reader.read()
        writer.enqueue(("first", number))
        first.result(timeout=FOUND_S)
        second = reader.read()
        time.sleep(0.0003)  # it sleeps by now
        writer.enqueue(("second", number))
        assert second.result(timeout=FOUND_S)[0] == ("second", number)
