"""Where the bytes of a new segment go while they are made and digested.

Both sinks share the work with a thread, and use a piece only until ``flush`` returns: a producer
may fill the same buffer again.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self

import numpy as np

from shared.spare_segments import spare_num_bytes

PIPE_CHUNK_BYTES = 1 << 22
"""What is written and digested at a time."""
MAPPED_CHUNK_BYTES = 1 << 18
"""What is copied and digested at a time: its digest finds it in the processor's cache."""


class SegmentSink(Protocol):
    """Appends bytes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def write(self, data: memoryview, digest: Any) -> None:
        """Take all of ``data``, which must not change before ``flush`` or the next ``write``;
        digest it if there is a digest."""
        ...

    def flush(self) -> None:
        """Wait for what was handed over."""
        ...


class Pipe:
    """One thread writes a chunk while the caller digests it and makes the next.

    Args:
        write: takes the next bytes; called in a thread, one call at a time.
    """

    def __init__(self, write: Callable[[memoryview], None]) -> None:
        self._write = write
        self._pool = ThreadPoolExecutor(1, "segment-writer")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown()

    def write(self, data: memoryview, digest: Any) -> None:
        """See ``SegmentSink``."""
        while data:
            chunk, data = data[:PIPE_CHUNK_BYTES], data[PIPE_CHUNK_BYTES:]
            self.flush()
            self._pending = self._pool.submit(self._write, chunk)
            if digest is not None:
                digest.update(chunk)

    def flush(self) -> None:
        """See ``SegmentSink``."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def has_all_memory(descriptor: int, num_bytes: int) -> bool:
    """Whether an open file of that length can be written through a mapping: where the memory is not
    there and cannot be had, the process would be killed (SIGBUS) instead of told (ENOSPC)."""
    return num_bytes > 0 and spare_num_bytes(descriptor) >= num_bytes


class MappedFile:
    """Copies straight into a file's memory, which must be there (``has_all_memory``).

    The caller goes through a piece from its front, copying a chunk and digesting it; a thread
    copies from its back until they meet. The rest the caller only digests. Neither waits for the
    other in between.

    Args:
        descriptor: of a file that nobody else has open.
        num_bytes: its length.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        # Populated: a fault for every page costs as much as the copy.
        self._map = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes: Any = np.frombuffer(self._map, dtype=np.uint8)
        self._position = 0
        self._pool = ThreadPoolExecutor(1, "segment-writer")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown()
        self._bytes = None
        # What interrupts a write still looks at the mapping, which then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()

    def write(self, data: memoryview, digest: Any) -> None:
        """See ``SegmentSink``. ``data`` is free when this returns."""
        source = np.frombuffer(data, dtype=np.uint8)
        target = self._bytes[self._position : self._position + len(source)]
        self._position += len(source)
        starts = deque(range(0, len(source), MAPPED_CHUNK_BYTES))

        def copy(start: int) -> None:
            end = start + MAPPED_CHUNK_BYTES
            np.copyto(target[start:end], source[start:end])

        def copy_from_the_back() -> None:
            with contextlib.suppress(IndexError):  # the rest is the caller's
                while True:
                    copy(starts.pop())

        helper = self._pool.submit(copy_from_the_back) if len(starts) > 1 else None
        for start in range(0, len(source), MAPPED_CHUNK_BYTES):
            with contextlib.suppress(IndexError):  # the rest is the thread's
                copy(starts.popleft())  # at ``start``: the thread takes from the other end
            if digest is not None:
                digest.update(data[start : start + MAPPED_CHUNK_BYTES])
        if helper is not None:
            helper.result()

    def flush(self) -> None:
        """See ``SegmentSink``."""
