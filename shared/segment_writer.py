"""Writes weight segments: bytes go to the file as they are made, and are digested on the way.

At most two chunks of a tensor are in memory at a time, so that a trainer needs no second copy of
its model to publish it, and nothing is read again for its digest.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from shared.errors import WeightTransferError
from shared.safetensors_file import DTYPE_NUM_BYTES, tensor_num_bytes
from shared.schemas.weights import TensorEntry, WeightManifest
from shared.segment_sinks import MappedFile, Pipe, SegmentSink, has_all_memory
from shared.spare_segments import spare_num_bytes, take_spare

TensorBuffer = bytes | bytearray | memoryview | npt.NDArray[Any]
TensorSource = tuple[str, str, tuple[int, ...], TensorBuffer]
"""Name, safetensors dtype, shape and the raw bytes (C-contiguous; bfloat16 as any 2-byte view)."""

PARTIAL_SUFFIX = ".partial"
HEADER_ALIGNMENT_BYTES = 8


class TensorSpec(NamedTuple):
    """A tensor that is about to be written."""

    name: str
    dtype: str
    """safetensors dtype name."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int | None:
        """None for a dtype or a shape that cannot be."""
        return tensor_num_bytes(self.dtype, self.shape)


def write_segment(
    path: str | Path,
    specs: Iterable[TensorSpec],
    produce: Callable[[TensorSpec], Iterable[TensorBuffer]],
    *,
    is_durable: bool = False,
    takes_spare: bool = False,
) -> WeightManifest:
    """Write a file that appears under ``path`` only when it is complete, and describe it.

    Larger elements come first, so that every tensor is aligned to its element.

    Args:
        produce: a tensor's bytes, in pieces; asked once per tensor, in the file's order.
        is_durable: survive a power cut (a disk, not shared memory).
        takes_spare: write into the memory of a superseded version, if there is one.

    Raises:
        WeightTransferError: a tensor does not fit its dtype and shape, the directory has too little
            room, or the file cannot be written. Nothing is left of it.
    """
    path = Path(path)
    entries = _write(path, specs, produce, is_durable, takes_spare)
    return WeightManifest(segment=path.name, tensors=entries)


class SegmentLayout(NamedTuple):
    """A file that is about to be written: its head, and what follows in which order."""

    header: bytes
    ordered: list[TensorSpec]
    num_bytes: int
    """Of the whole file."""


def lay_out(specs: Iterable[TensorSpec]) -> SegmentLayout:
    """Order the tensors, larger elements first.

    Raises:
        WeightTransferError: a name is used twice, or a dtype or shape cannot be.
    """
    ordered = sorted(specs, key=lambda spec: -DTYPE_NUM_BYTES.get(spec.dtype, 0))
    header = _header(ordered)
    return SegmentLayout(header, ordered, len(header) + sum(s.num_bytes or 0 for s in ordered))


def write_tensors(
    layout: SegmentLayout,
    produce: Callable[[TensorSpec], Iterable[TensorBuffer]],
    write: Callable[[memoryview], None],
) -> list[TensorEntry]:
    """Make the bytes of a file, one after the other, and digest them on the way.

    Args:
        write: takes the next bytes; called in a thread, one call at a time.

    Raises:
        WeightTransferError: a tensor does not fit its dtype and shape.
    """
    return _write_into(Pipe(write), layout, produce)


def _write_into(
    sink: SegmentSink,
    layout: SegmentLayout,
    produce: Callable[[TensorSpec], Iterable[TensorBuffer]],
) -> list[TensorEntry]:
    with sink:
        sink.write(memoryview(layout.header), None)
        entries = [_write_tensor(sink, spec, produce(spec)) for spec in layout.ordered]
        sink.flush()
    return entries


def _write(
    path: Path,
    specs: Iterable[TensorSpec],
    produce: Callable[[TensorSpec], Iterable[TensorBuffer]],
    is_durable: bool,
    takes_spare: bool,
) -> list[TensorEntry]:
    layout = lay_out(specs)
    with creating(
        path, layout.num_bytes, is_durable=is_durable, takes_spare=takes_spare
    ) as descriptor:
        if has_all_memory(descriptor, layout.num_bytes):
            return _write_into(MappedFile(descriptor, layout.num_bytes), layout, produce)
        return write_tensors(layout, produce, functools.partial(write_all, descriptor))


@contextlib.contextmanager
def creating(
    path: Path, needed_bytes: int, *, is_durable: bool = False, takes_spare: bool = False
) -> Iterator[int]:
    """A file that appears under ``path`` only if the body ends well: its descriptor, for writing.

    Args:
        needed_bytes: that must be free in its directory.
        is_durable: survive a power cut (a disk, not shared memory).
        takes_spare: the file has ``needed_bytes`` bytes, and may be a spare that is written over.

    Raises:
        WeightTransferError: too little room, or the file cannot be written. Nothing is left of it.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        spare = take_spare(path.parent, partial) if takes_spare else None
        if spare is not None:
            descriptor = spare
        else:
            check_free_space(path.parent, needed_bytes)
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                if spare is not None:
                    _fit(descriptor, path.parent, needed_bytes)
                yield file.fileno()
                if is_durable:
                    os.fsync(file.fileno())
            os.rename(partial, path)
            if is_durable:
                sync_directory(path.parent)
        except BaseException:  # also when interrupted: half a segment is of no use
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as exc:
        raise WeightTransferError(
            f"weight segment {path} ({needed_bytes} bytes) cannot be written: {exc.strerror}; "
            "see weights.shared_memory_dir and weights.filesystem_dir"
        ) from exc


def _fit(descriptor: int, directory: Path, num_bytes: int) -> None:
    """Give a spare its new length; what it has already needs no room."""
    check_free_space(directory, num_bytes - min(num_bytes, spare_num_bytes(descriptor)))
    os.ftruncate(descriptor, num_bytes)


def write_safetensors(path: str | Path, tensors: Iterable[TensorSource]) -> int:
    """Any safetensors file of tensors that lie in memory; its size in bytes."""
    sources = list(tensors)
    buffers = {name: buffer for name, _, _, buffer in sources}
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape, _ in sources]
    _write(
        Path(path), specs, lambda spec: (buffers[spec.name],), is_durable=False, takes_spare=False
    )
    return Path(path).stat().st_size


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensor(
    sink: SegmentSink, spec: TensorSpec, pieces: Iterable[TensorBuffer]
) -> TensorEntry:
    digest = xxhash.xxh3_128()
    num_bytes = 0
    for piece in pieces:
        try:
            view = as_bytes(piece)
        except TypeError as exc:
            raise _does_not_fit(spec, str(exc)) from exc
        num_bytes += len(view)
        if num_bytes > (spec.num_bytes or 0):
            raise _does_not_fit(spec, f"the buffer has {num_bytes} or more")
        sink.write(view, digest)
        sink.flush()  # the producer may use its buffer again
    if num_bytes != spec.num_bytes:
        raise _does_not_fit(spec, f"the buffer has {num_bytes}")
    return TensorEntry(
        name=spec.name,
        dtype=spec.dtype,
        shape=list(spec.shape),
        num_bytes=num_bytes,
        digest=digest.hexdigest(),
    )


def as_bytes(buffer: TensorBuffer) -> memoryview:
    """A buffer's bytes, without a copy.

    Raises:
        TypeError: it is not contiguous.
    """
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    if not view.c_contiguous:
        raise TypeError("the buffer is not contiguous")
    # memoryview cannot cast a view with a zero in its shape.
    return view.cast("B") if view.nbytes else memoryview(b"")


def _header(ordered: Sequence[TensorSpec]) -> bytes:
    header: dict[str, dict[str, object]] = {}
    position = 0
    for spec in ordered:
        if spec.name in header or spec.name in ("", "__metadata__"):
            raise WeightTransferError(f"tensor name {spec.name!r} is used twice or reserved")
        if spec.num_bytes is None:
            raise _does_not_fit(spec, "that dtype or shape cannot be written")
        end = position + spec.num_bytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _does_not_fit(spec: TensorSpec, what: str) -> WeightTransferError:
    return WeightTransferError(
        f"tensor {spec.name!r}: {spec.dtype} {list(spec.shape)} needs {spec.num_bytes} contiguous "
        f"bytes: {what}"
    )


def check_free_space(directory: Path, needed_bytes: int) -> None:
    """
    Raises:
        WeightTransferError: the directory has too little room.
        OSError: it is not there.
    """
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        raise WeightTransferError(
            f"a weight segment needs {needed_bytes} bytes, {directory} has {free_bytes} free: make "
            "room or choose another weights.shared_memory_dir or weights.filesystem_dir (a push "
            "keeps two versions)"
        )


def write_all(descriptor: int, data: memoryview) -> None:
    """Write, however often the system has to be asked."""
    while data:
        data = data[os.write(descriptor, data) :]
