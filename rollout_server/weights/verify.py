"""Is a segment what its manifest says, and could a model be served from it?

Called by the coordinator in a thread, once per push and host. Works from one open descriptor, in
chunks that stay in the processor's cache: each byte is read once, digested and checked for NaN and
infinity.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import xxhash

from shared.errors import WeightVerificationError
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


def verify_segment(path: str | Path, manifest: WeightManifest) -> None:
    """Check a segment against its manifest. Blocks.

    The file's name is not compared: the coordinator verifies its own hard link of it.

    Raises:
        WeightVerificationError: not a regular, sound safetensors file, or a tensor is missing,
            unexpected, of another dtype, shape or digest, or not finite. Names the tensor.
    """
    expected = _by_name(manifest)
    descriptor = open_regular_file(path)
    try:
        found = read_header_at(descriptor, str(path))
        _compare_names(expected, found)
        for name, span in found.items():
            _compare_layout(expected[name], span)
        _check_all_bytes(descriptor, str(path), expected, found)
    finally:
        os.close(descriptor)


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
    descriptor: int, path: str, expected: dict[str, TensorEntry], found: dict[str, TensorSpan]
) -> None:
    """In threads: reading, digesting and numpy all leave the interpreter lock."""
    with ThreadPoolExecutor(_num_threads(), "verify") as pool:
        checks = [
            pool.submit(_check_bytes, descriptor, path, expected[name], span)
            for name, span in found.items()
        ]
        try:
            for check in checks:
                check.result()
        except BaseException:  # one bad tensor is enough: do not look at the others
            pool.shutdown(cancel_futures=True)
            raise


def _num_threads() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def _check_bytes(descriptor: int, path: str, entry: TensorEntry, span: TensorSpan) -> None:
    mask = _EXPONENT_MASKS.get(span.dtype)
    scratch = None if mask is None else np.empty(CHUNK_BYTES // mask.itemsize, dtype=mask.dtype)
    first_not_finite: int | None = None
    num_elements = 0
    digest = xxhash.xxh3_128()
    for chunk in read_range(descriptor, span.start, span.end, path):
        digest.update(chunk)
        if mask is None or scratch is None or first_not_finite is not None:
            continue
        bits = np.frombuffer(chunk, dtype=mask.dtype)
        offset = find_not_finite(bits, mask, scratch)
        if offset is not None:
            first_not_finite = num_elements + offset
        num_elements += len(bits)
    # The digest comes first: in bytes that were damaged on the way a NaN is only a symptom.
    if digest.hexdigest() != entry.digest.lower():
        _refuse(entry.name, f"digest {entry.digest}", f"digest {digest.hexdigest()}")
    if first_not_finite is not None:
        _refuse(entry.name, "finite values", f"NaN or infinity at element {first_not_finite}")


def find_not_finite(
    bits: npt.NDArray[Any], mask: np.unsignedinteger[Any], scratch: npt.NDArray[Any]
) -> int | None:
    """Index of the first NaN or infinity among float bit patterns, or None.

    Args:
        bits: [n] floats seen as unsigned integers.
        mask: the exponent bits of that float format.
        scratch: at least [n], of the same dtype; overwritten.
    """
    if not len(bits):
        return None
    exponents = np.bitwise_and(bits, mask, out=scratch[: len(bits)])
    # max is vectorised where comparing and any would make two more passes.
    return int(np.argmax(exponents)) if exponents.max() == mask else None


def _refuse(name: str, expected: str, found: str) -> NoReturn:
    raise WeightVerificationError(
        f"tensor {name!r}: expected {expected}, found {found}", param="manifest.tensors"
    )
