"""The safetensors file format: 8 bytes of header length, a JSON header, the tensors' bytes.

Written out here because the numpy binding of the ``safetensors`` package has no bfloat16 and the
contract layer may not import torch. Readers of a push go through ``read_header`` before they trust
a single offset; everything a header may get wrong raises ``WeightVerificationError``.

Bytes are read with ``pread`` into one small buffer and never mapped: a file that its owner
truncates while it is being read is then an error of that push, where a mapping would end the
process with a SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import WeightVerificationError

DTYPE_NUM_BYTES: dict[str, int] = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per element of every dtype a push may carry."""

LENGTH_NUM_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
CHUNK_BYTES = 1 << 19
"""Bytes read at a time: stays in the processor's cache, and every element size divides it."""

_SPAN_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpan:
    """Where one tensor lies: bytes ``[start, end)``, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def tensor_num_bytes(dtype: str, shape: tuple[int, ...] | list[int]) -> int | None:
    """Size of a dense tensor in bytes; None for a dtype or a shape that cannot be."""
    element_bytes = DTYPE_NUM_BYTES.get(dtype)
    if element_bytes is None or any(extent < 0 for extent in shape):
        return None
    return element_bytes * math.prod(shape)


def open_regular_file(path: str | Path) -> int:
    """Open for reading and return the descriptor, which the caller closes.

    Raises:
        WeightVerificationError: missing, not readable, a symbolic link or not a regular file.
    """
    try:
        # Without O_NONBLOCK a FIFO of that name would block the open for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise WeightVerificationError(
            f"weight segment {path} cannot be opened as a regular file: {exc.strerror}",
            param="manifest.segment",
        ) from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WeightVerificationError(
            f"weight segment {path} is not a regular file", param="manifest.segment"
        )
    return descriptor


def read_header(path: str | Path) -> dict[str, TensorSpan]:
    """Read and check a file's header.

    Follows symbolic links, which model directories are full of; pushed segments are opened with
    ``open_regular_file``, which does not.

    Returns:
        Name to span, in order of position in the file. The spans cover the file from the end of the
        header to its last byte, without gaps or overlaps.

    Raises:
        WeightVerificationError: the file is not a sound safetensors file.
    """
    descriptor = open_regular_file(os.path.realpath(path))
    try:
        return read_header_at(descriptor, str(path))
    finally:
        os.close(descriptor)


def read_header_at(descriptor: int, path: str) -> dict[str, TensorSpan]:
    """``read_header`` of an open file; ``path`` only names it in errors."""
    file_bytes = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, LENGTH_NUM_BYTES, 0)
    if len(prefix) < LENGTH_NUM_BYTES:
        raise _unsound(path, f"{file_bytes} bytes cannot hold a safetensors header")
    header_bytes = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, file_bytes - LENGTH_NUM_BYTES)
    if header_bytes > limit:
        raise _unsound(path, f"header length {header_bytes} is above the limit of {limit} bytes")
    raw = b"".join(
        bytes(chunk)
        for chunk in read_range(descriptor, LENGTH_NUM_BYTES, LENGTH_NUM_BYTES + header_bytes, path)
    )
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as exc:
        raise _unsound(path, f"header is not JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise _unsound(path, f"header is a JSON {type(header).__name__}, not an object")
    data_start = LENGTH_NUM_BYTES + header_bytes
    spans = [
        (name, _parse_span(path, name, entry, data_start))
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    spans.sort(key=lambda item: (item[1].start, item[1].end))
    _check_cover(path, spans, data_start, file_bytes)
    return dict(spans)


def read_range(
    descriptor: int, start: int, end: int, path: str, buffer: memoryview | None = None
) -> Iterator[memoryview]:
    """Yield the bytes ``[start, end)`` in chunks that are valid until the next one is asked for.

    Args:
        path: only names the file in errors.
        buffer: what chunks are read into; one of its own when absent.

    Raises:
        WeightVerificationError: the file ends early.
    """
    if buffer is None:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(end - start, 1))))
    position = start
    while position < end:
        chunk = buffer[: min(len(buffer), end - position)]
        read_into(descriptor, chunk, position, path)
        yield chunk
        position += len(chunk)


def read_into(descriptor: int, buffer: memoryview, start: int, path: str) -> None:
    """Fill a buffer of bytes from position ``start``; ``path`` only names the file in errors.

    Raises:
        WeightVerificationError: the file ends early.
    """
    filled = 0
    while filled < len(buffer):
        num_read = os.preadv(descriptor, [buffer[filled:]], start + filled)
        if num_read == 0:
            end = start + len(buffer)
            raise _unsound(path, f"ends at byte {start + filled}, expected {end}: truncated")
        filled += num_read


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"duplicate key {', '.join(twice)}")
    return found


def _parse_span(path: str, name: str, entry: Any, data_start: int) -> TensorSpan:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if len(
            entry
        ) == 3 and all(type(value) is int for value in (*shape, start, end)):
            pass
        case _:
            raise _unsound(
                path, f"tensor {name!r}: expected dtype, shape and data_offsets, found {entry!r}"
            )
    expected_bytes = tensor_num_bytes(dtype, shape)
    if expected_bytes is None:
        raise _unsound(
            path,
            f"tensor {name!r}: dtype {dtype!r} with shape {shape} is not supported "
            f"(dtypes: {', '.join(DTYPE_NUM_BYTES)})",
        )
    if end - start != expected_bytes:
        raise _unsound(
            path,
            f"tensor {name!r}: {dtype} {shape} needs {expected_bytes} bytes, "
            f"its offsets [{start}, {end}) span {end - start}",
        )
    return TensorSpan(
        dtype=dtype, shape=tuple(shape), start=data_start + start, end=data_start + end
    )


def _check_cover(
    path: str, spans: list[tuple[str, TensorSpan]], data_start: int, file_bytes: int
) -> None:
    position = data_start
    for name, span in spans:
        if span.start != position:
            what = "overlaps the tensor before it" if span.start < position else "leaves a gap"
            raise _unsound(
                path, f"tensor {name!r} {what}: starts at byte {span.start}, expected {position}"
            )
        position = span.end
    if position != file_bytes:
        raise _unsound(path, f"tensors end at byte {position}, the file at byte {file_bytes}")


def _unsound(path: str, what: str) -> WeightVerificationError:
    return WeightVerificationError(f"weight segment {path}: {what}", param="manifest.segment")
