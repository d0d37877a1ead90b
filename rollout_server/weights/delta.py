"""Makes the file of a new version from the committed one and a delta, and verifies it on the way.

Each byte is read once, changed, digested, checked for NaN and infinity, and written: what engines
load is what was checked. Works a piece of a tensor at a time, in a few threads. The committed file
is only read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rollout_server.weights.snapshot import CommittedSnapshot
from rollout_server.weights.verify import TensorCheck, compare_with_manifest, for_each_tensor
from shared.errors import WeightVerificationError
from shared.safetensors_file import (
    TensorSpan,
    open_regular_file,
    read_header_at,
    read_into,
    read_range,
)
from shared.schemas.weights import TensorEntry, WeightManifest
from shared.segment_writer import creating, write_all
from shared.weight_delta import PIECE_ELEMENTS, PieceReader, element_type


def apply_delta(
    base: CommittedSnapshot,
    delta_path: str | Path,
    manifest: WeightManifest,
    target: Path,
    is_given_up: Callable[[], bool],
    *,
    is_durable: bool,
) -> None:
    """Write ``target``, a full segment as the manifest says. Blocks.

    Args:
        manifest: of the result.
        is_given_up: asked before every tensor; True ends the work.
        is_durable: survive a power cut (a disk, not shared memory).

    Raises:
        WeightVerificationError: the delta is damaged, or leads to other tensors than the manifest's
            or to values that are not finite. Nothing is left of the target.
        WeightTransferError: no room, or the file cannot be written.
    """
    base_file = open_regular_file(base.path)
    try:
        delta_file = open_regular_file(delta_path)
        try:
            delta = _Application(base_file, base.path, delta_file, str(delta_path), manifest)
            delta.write(target, is_given_up, is_durable)
        finally:
            os.close(delta_file)
    finally:
        os.close(base_file)


class _Application:
    """One delta to one base, both open."""

    def __init__(
        self, base: int, base_path: str, delta: int, delta_path: str, manifest: WeightManifest
    ) -> None:
        self._base = base
        self._base_path = base_path
        self._delta = delta
        self._delta_path = delta_path
        self._layout = read_header_at(base, base_path)
        self._expected = compare_with_manifest(self._layout, manifest)
        self._changed = read_header_at(delta, delta_path)
        for name, span in self._changed.items():
            if name not in self._expected or span.dtype != "U8":
                raise WeightVerificationError(
                    f"delta {delta_path}: {name!r} is no tensor of the manifest, or of another "
                    f"kind than a delta's ({span.dtype})",
                    param="manifest.segment",
                )

    def write(self, target: Path, is_given_up: Callable[[], bool], is_durable: bool) -> None:
        num_bytes = os.fstat(self._base).st_size
        header_bytes = min((span.start for span in self._layout.values()), default=num_bytes)
        with creating(
            target, num_bytes, is_durable=is_durable, takes_spare=not is_durable
        ) as descriptor:
            for chunk in read_range(self._base, 0, header_bytes, self._base_path):
                write_all(descriptor, chunk)
            for_each_tensor(
                self._layout, lambda name: self._write_tensor(descriptor, name), is_given_up
            )

    def _write_tensor(self, descriptor: int, name: str) -> None:
        span, entry = self._layout[name], self._expected[name]
        check = TensorCheck(entry)
        changed = self._changed.get(name)
        pieces = (
            None if changed is None else PieceReader(name, self._delta, changed, self._delta_path)
        )
        self._write_pieces(descriptor, span, entry, check, pieces)
        if pieces is not None:
            pieces.finish()
        check.finish()

    def _write_pieces(
        self,
        descriptor: int,
        span: TensorSpan,
        entry: TensorEntry,
        check: TensorCheck,
        pieces: PieceReader | None,
    ) -> None:
        dtype = element_type(entry.dtype)
        scratch = np.empty(min(PIECE_ELEMENTS, span.num_bytes // dtype.itemsize), dtype=dtype)
        position = span.start
        while position < span.end:
            elements = scratch[: (span.end - position) // dtype.itemsize]
            view = elements.data.cast("B")
            read_into(self._base, view, position, self._base_path)
            if pieces is not None:
                pieces.apply_next(elements)
            check.update(view)
            _write_at(descriptor, view, position)
            position += len(view)


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        num_written = os.pwrite(descriptor, data, position)
        data, position = data[num_written:], position + num_written
