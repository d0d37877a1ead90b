"""Is a segment what its manifest says, and could a model be served from it?

Called by the coordinator in a thread, once per push and host. Works from one open descriptor, in
chunks that stay in the processor's cache: each byte is read once, digested and checked for NaN and
infinity.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import xxhash

from shared.errors import WeightTransferError, WeightVerificationError
from shared.safetensors_file import (
    CHUNK_BYTES,
    TensorSpan,
    open_regular_file,
    read_header_at,
    read_range,
    tensor_num_bytes,
)
from shared.schemas.weights import TensorEntry, WeightManifest

MAX_THREADS = 8
"""Memory is the limit well before."""

_EXPONENT_MASKS: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}
"""A float is NaN or infinite exactly when all of its exponent bits are set."""


def verify_segment(
    path: str | Path,
    manifest: WeightManifest,
    is_given_up: Callable[[], bool] = lambda: False,
) -> None:
    """Check a segment against its manifest. Blocks.

    The file's name is not compared: the coordinator verifies its own hard link of it.

    Args:
        is_given_up: asked before every tensor; True ends the work.

    Raises:
        WeightVerificationError: not a regular, sound safetensors file, or a tensor is missing,
            unexpected, of another dtype, shape or digest, or not finite. Names the tensor.
    """
    descriptor = open_regular_file(path)
    try:
        found = read_header_at(descriptor, str(path))
        expected = compare_with_manifest(found, manifest)
        _check_all_bytes(descriptor, str(path), expected, found, is_given_up)
    finally:
        os.close(descriptor)


def compare_with_manifest(
    found: dict[str, TensorSpan], manifest: WeightManifest
) -> dict[str, TensorEntry]:
    """Does a file's header have the manifest's tensors? Their entries by name.

    Raises:
        WeightVerificationError: naming the first tensor that differs.
    """
    expected = _by_name(manifest)
    _compare_names(expected, found)
    for name, span in found.items():
        _compare_layout(expected[name], span)
    return expected


def _by_name(manifest: WeightManifest) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for entry in manifest.tensors:
        if entry.name in entries:
            _refuse(entry.name, "one manifest entry", "two")
        num_bytes = tensor_num_bytes(entry.dtype, entry.shape)
        if num_bytes != entry.num_bytes:
            _refuse(
                entry.name,
                f"{num_bytes} bytes for {entry.dtype} {entry.shape}",
                f"num_bytes {entry.num_bytes} in the manifest",
            )
        entries[entry.name] = entry
    return entries


def _compare_names(expected: dict[str, TensorEntry], found: dict[str, TensorSpan]) -> None:
    for name in expected:
        if name not in found:
            _refuse(name, "the tensor of the manifest", "no such tensor in the file")
    for name in found:
        if name not in expected:
            _refuse(name, "only tensors of the manifest", "an extra tensor in the file")


def _compare_layout(entry: TensorEntry, span: TensorSpan) -> None:
    if span.dtype != entry.dtype:
        _refuse(entry.name, f"dtype {entry.dtype}", f"dtype {span.dtype}")
    if list(span.shape) != entry.shape:
        _refuse(entry.name, f"shape {entry.shape}", f"shape {list(span.shape)}")


def _check_all_bytes(
    descriptor: int,
    path: str,
    expected: dict[str, TensorEntry],
    found: dict[str, TensorSpan],
    is_given_up: Callable[[], bool],
) -> None:
    buffers = threading.local()  # memory made anew for every tensor costs as much as its digest

    def check_one(name: str) -> None:
        if not hasattr(buffers, "chunk"):
            buffers.chunk = memoryview(bytearray(CHUNK_BYTES))
        check = TensorCheck(expected[name])
        span = found[name]
        for chunk in read_range(descriptor, span.start, span.end, path, buffers.chunk):
            check.update(chunk)
        check.finish()

    for_each_tensor(found, check_one, is_given_up)


def for_each_tensor(
    names: Iterable[str], work: Callable[[str], None], is_given_up: Callable[[], bool]
) -> None:
    """In threads: reading, digesting and numpy all leave the interpreter lock.

    Raises:
        WeightTransferError: it was given up.
        Exception: the first of ``work``.
    """

    def unless_given_up(name: str) -> None:
        if is_given_up():
            raise WeightTransferError("given up: nobody waits for these weights any more")
        work(name)

    with ThreadPoolExecutor(_num_threads(), "weights") as pool:
        jobs = [pool.submit(unless_given_up, name) for name in names]
        try:
            for job in jobs:
                job.result()
        except BaseException:  # one bad tensor is enough: do not look at the others
            pool.shutdown(cancel_futures=True)
            raise


def _num_threads() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


class TensorCheck:
    """Digest and finiteness of one tensor, a chunk at a time."""

    def __init__(self, entry: TensorEntry) -> None:
        self._entry = entry
        self._mask = _EXPONENT_MASKS.get(entry.dtype)
        self._digest = xxhash.xxh3_128()
        self._num_elements = 0
        self._first_not_finite: int | None = None

    def update(self, chunk: memoryview) -> None:
        """The tensor's next bytes, in whole elements."""
        self._digest.update(chunk)
        mask = self._mask
        if mask is None or self._first_not_finite is not None:
            return
        bits = np.frombuffer(chunk, dtype=mask.dtype)
        offset = find_not_finite(bits, mask)
        if offset is not None:
            self._first_not_finite = self._num_elements + offset
        self._num_elements += len(bits)

    def finish(self) -> None:
        """
        Raises:
            WeightVerificationError: the digest is another one, or an element is not finite.
        """
        entry = self._entry
        # The digest comes first: in bytes that were damaged on the way a NaN is only a symptom.
        if self._digest.hexdigest() != entry.digest.lower():
            _refuse(entry.name, f"digest {entry.digest}", f"digest {self._digest.hexdigest()}")
        if self._first_not_finite is not None:
            _refuse(
                entry.name, "finite values", f"NaN or infinity at element {self._first_not_finite}"
            )


def find_not_finite(bits: npt.NDArray[Any], mask: np.unsignedinteger[Any]) -> int | None:
    """Index of the first NaN or infinity among float bit patterns, or None.

    Args:
        bits: [n] floats seen as unsigned integers.
        mask: the exponent bits of that float format.
    """
    if not len(bits):
        return None
    # As signed integers positive floats are in their order, as unsigned ones negative floats are,
    # with NaN and infinity at the end. Two reductions, which only read, beat one pass that writes.
    sign = np.left_shift(mask.dtype.type(1), 8 * mask.dtype.itemsize - 1)
    signed = bits.view(f"i{mask.dtype.itemsize}")
    if signed.max() < mask and bits.max() < (mask | sign):
        return None
    return int(np.argmax((bits & mask) == mask))


def _refuse(name: str, expected: str, found: str) -> NoReturn:
    raise WeightVerificationError(
        f"tensor {name!r}: expected {expected}, found {found}", param="manifest.tensors"
    )
