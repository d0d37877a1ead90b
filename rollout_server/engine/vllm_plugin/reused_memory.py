"""While weights are loaded, memory that is freed stays with the process for what comes next.

A load makes and drops blocks of tens of megabytes, layer after layer: vLLM puts a layer together in
one, oneDNN packs it into another, the old packed one is freed. glibc asks the kernel for each such
block and gives it back at once, and the kernel zeroes every page of the next. Measured figures:
``docs/weights.md``.

Leans on glibc's ``mallopt`` and ``malloc_trim``. Where they are missing, or another allocator has
taken ``malloc``'s place (vLLM's CPU guide suggests tcmalloc, which keeps freed memory by itself),
nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NEVER_TRIM_BYTES = 2**31 - 1
DEFAULT_MMAP_MAX = 65536
TRIM_THRESHOLD_BYTES = 64 << 20
"""What glibc comes to by itself, twice its largest threshold for blocks of their own."""


@contextlib.contextmanager
def reused_memory(*, give_back: bool = True) -> Iterator[None]:
    """For the length of a load, or of a part of one.

    Args:
        give_back: what is left over at the end goes back to the kernel at once. Else it stays for
            the next load; a load that packs into the memory of what it replaces leaves little.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM_BYTES)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
        if give_back:
            libc.malloc_trim(0)
