"""Writes delta segments: a policy as its difference from a version that lies in a file.

Works like ``segment_writer``: the policy's bytes are made a piece at a time, compared with the same
bytes of the base file, and digested. Neither the policy nor the delta is ever in memory whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shared.errors import WeightTransferError
from shared.safetensors_file import (
    LENGTH_NUM_BYTES,
    TensorSpan,
    open_regular_file,
    read_header_at,
    read_into,
)
from shared.schemas.weights import TensorEntry, WeightManifest
from shared.segment_writer import TensorBuffer, TensorSpec, as_bytes, creating, write_all
from shared.types import SegmentEncoding
from shared.weight_delta import PIECE_ELEMENTS, Elements, element_type, encode_piece

_LARGEST_OFFSET = 10**15
"""Stands in the header until the real offsets are known: as long as they can become."""


class DeltaTooLargeError(WeightTransferError):
    """So much has changed that the whole policy is the better push."""


def write_delta(
    path: str | Path,
    specs: Iterable[TensorSpec],
    produce: Callable[[TensorSpec], Iterable[TensorBuffer]],
    *,
    base_path: str | Path,
    limit_bytes: int,
    is_durable: bool = False,
) -> WeightManifest:
    """Write what changed since ``base_path``, as a file that appears only when it is complete.

    Args:
        produce: a tensor's bytes, in pieces; asked once per tensor.
        base_path: a segment of the same tensors.
        limit_bytes: what the delta may be at most.

    Returns:
        The manifest of the whole policy, which the delta leads to.

    Raises:
        WeightVerificationError: the base cannot be read.
        DeltaTooLargeError: the limit is passed, or the base has other tensors.
        WeightTransferError: no room, or the file cannot be written. Nothing is left of it.
    """
    path = Path(path)
    ordered = list(specs)
    base = open_regular_file(base_path)
    try:
        spans = read_header_at(base, str(base_path))
        _compare(ordered, spans)
        with creating(path, limit_bytes, is_durable=is_durable) as descriptor:
            writer = _DeltaWriter(descriptor, base, str(base_path), limit_bytes)
            entries = writer.write(ordered, spans, produce)
    finally:
        os.close(base)
    return WeightManifest(segment=path.name, encoding=SegmentEncoding.DELTA, tensors=entries)


def _compare(specs: Sequence[TensorSpec], spans: dict[str, TensorSpan]) -> None:
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    if wanted != {name: (span.dtype, span.shape) for name, span in spans.items()}:
        raise DeltaTooLargeError("the base has other tensors than the policy")


class _DeltaWriter:
    """Into one open file. ``write`` is called once."""

    def __init__(self, descriptor: int, base: int, base_path: str, limit_bytes: int) -> None:
        self._descriptor = descriptor
        self._base = base
        self._base_path = base_path
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        """Of the data section, so far."""

    def write(
        self,
        specs: Sequence[TensorSpec],
        spans: dict[str, TensorSpan],
        produce: Callable[[TensorSpec], Iterable[TensorBuffer]],
    ) -> list[TensorEntry]:
        header_bytes = len(
            _header({spec.name: (_LARGEST_OFFSET, _LARGEST_OFFSET) for spec in specs})
        )
        os.lseek(self._descriptor, LENGTH_NUM_BYTES + header_bytes, os.SEEK_SET)
        entries: list[TensorEntry] = []
        changed: dict[str, tuple[int, int]] = {}
        with ThreadPoolExecutor(1, "delta-digest") as digesting:
            for spec in specs:
                start = self._num_bytes
                digest = xxhash.xxh3_128()
                has_changed = self._write_tensor(spec, spans[spec.name], produce, digest, digesting)
                if has_changed:
                    changed[spec.name] = (start, self._num_bytes)
                else:
                    self._take_back(start)
                entries.append(
                    TensorEntry(
                        name=spec.name,
                        dtype=spec.dtype,
                        shape=list(spec.shape),
                        num_bytes=spans[spec.name].num_bytes,
                        digest=digest.hexdigest(),
                    )
                )
        header = _header(changed).ljust(header_bytes)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        write_all(
            self._descriptor,
            memoryview(len(header).to_bytes(LENGTH_NUM_BYTES, "little") + header),
        )
        return entries

    def _write_tensor(
        self,
        spec: TensorSpec,
        span: TensorSpan,
        produce: Callable[[TensorSpec], Iterable[TensorBuffer]],
        digest: Any,
        digesting: ThreadPoolExecutor,
    ) -> bool:
        """Append a tensor's pieces; False if it is what it was."""
        dtype = element_type(spec.dtype)
        piece_bytes = PIECE_ELEMENTS * dtype.itemsize
        old = np.empty(PIECE_ELEMENTS, dtype=dtype)
        position = span.start
        has_changed = False
        for buffer in _in_multiples(produce(spec), piece_bytes):
            if position + len(buffer) > span.end:
                raise WeightTransferError(
                    f"tensor {spec.name!r}: {span.num_bytes} bytes expected, more were made"
                )
            digested = digesting.submit(digest.update, buffer)
            new = np.frombuffer(buffer, dtype=dtype)
            for first in range(0, len(new), PIECE_ELEMENTS):
                piece = new[first : first + PIECE_ELEMENTS]
                base = old[: len(piece)]
                read_into(self._base, base.data.cast("B"), position, self._base_path)
                has_changed |= self._append(base, piece)
                position += piece.nbytes
            digested.result()  # the producer may use its buffer again
        if position != span.end:
            raise WeightTransferError(
                f"tensor {spec.name!r}: {span.num_bytes} bytes expected, "
                f"{position - span.start} were made"
            )
        return has_changed

    def _append(self, old: Elements, new: Elements) -> bool:
        encoded, num_changed = encode_piece(old, new)
        self._num_bytes += len(encoded)
        if self._num_bytes > self._limit_bytes:
            raise DeltaTooLargeError(
                f"the delta is longer than {self._limit_bytes} bytes (weights.delta_max_share)"
            )
        write_all(self._descriptor, memoryview(encoded))
        return num_changed > 0

    def _take_back(self, start: int) -> None:
        """Of a tensor that did not change not even its empty pieces are sent."""
        length = self._num_bytes - start
        if length:
            end = os.lseek(self._descriptor, -length, os.SEEK_CUR)
            os.ftruncate(self._descriptor, end)
        self._num_bytes = start


def _in_multiples(buffers: Iterable[TensorBuffer], piece_bytes: int) -> Iterable[memoryview]:
    """The same bytes, in buffers of whole pieces but for the last one."""
    rest = bytearray()
    for buffer in buffers:
        view = as_bytes(buffer)
        if rest:
            missing = -len(rest) % piece_bytes
            rest += view[:missing]
            view = view[missing:]
            if len(rest) % piece_bytes:
                continue
            yield memoryview(rest)
            rest = bytearray()
        whole = len(view) - len(view) % piece_bytes
        if whole:
            yield view[:whole]
        rest += view[whole:]
    if rest:
        yield memoryview(rest)


def _header(offsets: dict[str, tuple[int, int]]) -> bytes:
    entries = {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in offsets.items()
    }
    return json.dumps(entries, separators=(",", ":")).encode()
