"""While weights are loaded, memory that is freed stays with the process for what comes next.

A load makes and drops blocks of tens of megabytes, layer after layer: vLLM puts a layer together in
one, oneDNN packs it into another, the old packed one is freed. glibc asks the kernel for each such
block and gives it back at once, and the kernel zeroes every page of the next. Measured figures:
``docs/weights.md``.

Leans on glibc's ``mallopt``. Where it is missing, or another allocator has taken ``malloc``'s place
(vLLM's CPU guide suggests tcmalloc, which keeps freed memory by itself), nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
NEVER_TRIM_BYTES = 2**31 - 1
DEFAULT_MMAP_MAX = 65536
MMAP_THRESHOLD_BYTES = 32 << 20
"""Blocks above it get pages of their own. glibc comes to this, its largest, by itself as blocks are
freed, but no more once ``mallopt`` was called."""
TRIM_THRESHOLD_BYTES = 2 * MMAP_THRESHOLD_BYTES
"""What glibc comes to by itself."""


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """For the length of a load, or of a part of one. What is left over stays for the next: a layer
    or two, and as much as was loaded ahead of a pause."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM_BYTES)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
