"""Weight segments: the safetensors files in which a trainer hands a policy to the server.

A segment's name carries its owner, so that whoever comes next can tell a file in use from one left
behind by a process that died (``sweep_stale_segments``). Nothing here imports torch: tensors
travel as ``(name, dtype, shape, buffer)``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shared.errors import WeightTransferError
from shared.safetensors_file import (
    DTYPE_NUM_BYTES,
    TensorSpan,
    open_regular_file,
    read_header,
    read_header_at,
    read_range,
    tensor_num_bytes,
)
from shared.schemas.weights import TensorEntry, WeightManifest

__all__ = [
    "DTYPE_NUM_BYTES",
    "SegmentKind",
    "TensorSource",
    "TensorSpan",
    "build_manifest",
    "read_header",
    "segment_name",
    "sweep_stale_segments",
    "write_safetensors",
]

TensorBuffer = bytes | bytearray | memoryview | npt.NDArray[Any]
TensorSource = tuple[str, str, tuple[int, ...], TensorBuffer]
"""Name, safetensors dtype, shape and the raw bytes (C-contiguous; bfloat16 as any 2-byte view)."""

PARTIAL_SUFFIX = ".partial"
HEADER_ALIGNMENT_BYTES = 8

_SEGMENT_NAME = re.compile(
    r"slipstream-(?:weights|server)-(?P<pid>[0-9]+)(?:\.(?P<start>[0-9]+)\.(?P<namespace>[0-9]+))?"
    r"-v[0-9]+\.safetensors(?:\.partial)?"
)


class SegmentKind(StrEnum):
    """Whose file it is."""

    TRAINER = "weights"
    """Written by a trainer, which removes it after the push."""
    SERVER = "server"
    """The server's hard link to a pushed file: kept while that version may be needed."""


def segment_name(pid: int, version: int, kind: SegmentKind = SegmentKind.TRAINER) -> str:
    """File name of a segment owned by process ``pid``.

    ``slipstream-weights-<pid>.<process start>.<pid namespace>-v<version>.safetensors``: the start
    time tells a reused pid from the owner, the namespace another container's pids from ours. Both
    are left out where the process cannot be looked up.
    """
    start = _process_start_ticks(pid)
    owner = str(pid) if start is None else f"{pid}.{start}.{_pid_namespace()}"
    return f"slipstream-{kind.value}-{owner}-v{version}.safetensors"


def write_safetensors(path: str | Path, tensors: Iterable[TensorSource]) -> int:
    """Write a file that appears under ``path`` only when it is complete.

    The bytes go from the buffers to the file in one copy. Larger elements come first, so that every
    tensor is aligned to its element.

    Returns:
        Size of the file in bytes.

    Raises:
        WeightTransferError: a tensor does not fit its dtype and shape, the directory has too little
            room, or the file cannot be written.
    """
    path = Path(path)
    header, parts = _lay_out(tensors)
    needed_bytes = len(header) + sum(part.nbytes for part in parts)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        _check_free_space(path.parent, needed_bytes)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for part in (memoryview(header), *parts):
                    _write_all(file.fileno(), part)
            os.rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise WeightTransferError(
            f"weight segment {path} ({needed_bytes} bytes) cannot be written: {exc.strerror}; "
            "see weights.shared_memory_dir"
        ) from exc
    return needed_bytes


def build_manifest(path: str | Path) -> WeightManifest:
    """Describe a segment: names, dtypes, shapes and the xxh3-128 digest of every tensor.

    Raises:
        WeightVerificationError: not a sound safetensors file.
    """
    path = Path(path)
    descriptor = open_regular_file(path)
    try:
        entries = []
        for name, span in read_header_at(descriptor, str(path)).items():
            digest = xxhash.xxh3_128()
            for chunk in read_range(descriptor, span.start, span.end, str(path)):
                digest.update(chunk)
            entries.append(
                TensorEntry(
                    name=name,
                    dtype=span.dtype,
                    shape=list(span.shape),
                    num_bytes=span.num_bytes,
                    digest=digest.hexdigest(),
                )
            )
    finally:
        os.close(descriptor)
    return WeightManifest(segment=path.name, tensors=entries)


def sweep_stale_segments(directory: str | Path) -> list[str]:
    """Remove the segments whose owner is dead; the names of those removed.

    Files of other pid namespaces are left alone: whether their owners live cannot be seen here.
    """
    removed = []
    for path in sorted(Path(directory).glob("slipstream-*")):
        owner = _SEGMENT_NAME.fullmatch(path.name)
        if owner is None or _is_alive(owner["pid"], owner["start"], owner["namespace"]):
            continue
        try:
            path.unlink()
        except FileNotFoundError:
            continue  # another process swept it first
        except PermissionError:
            continue  # another user's file: theirs to sweep
        removed.append(path.name)
    return removed


def _lay_out(tensors: Iterable[TensorSource]) -> tuple[bytes, list[memoryview]]:
    ordered = sorted(tensors, key=lambda source: -DTYPE_NUM_BYTES.get(source[1], 0))
    header: dict[str, dict[str, object]] = {}
    parts = []
    position = 0
    for name, dtype, shape, buffer in ordered:
        expected_bytes = tensor_num_bytes(dtype, shape)
        view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        if name in header or name in ("", "__metadata__"):
            raise WeightTransferError(f"tensor name {name!r} is used twice or reserved")
        if expected_bytes is None or view.nbytes != expected_bytes or not view.c_contiguous:
            raise WeightTransferError(
                f"tensor {name!r}: {dtype} {list(shape)} needs {expected_bytes} contiguous bytes, "
                f"the buffer has {view.nbytes}"
            )
        end = position + expected_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
        if expected_bytes:  # memoryview cannot cast a view with a zero in its shape
            parts.append(view.cast("B"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text, parts


def _check_free_space(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        raise WeightTransferError(
            f"a weight segment needs {needed_bytes} bytes, {directory} has {free_bytes} free: "
            "make room or choose another weights.shared_memory_dir (a push keeps two versions)"
        )


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _is_alive(pid: str, start: str | None, namespace: str | None) -> bool:
    if namespace is not None and int(namespace) != _pid_namespace():
        return True
    found = _process_start_ticks(int(pid))
    if found is None:
        return Path(f"/proc/{pid}").exists()
    return start is None or int(start) == found


def _process_start_ticks(pid: int) -> int | None:
    """Start of a process in clock ticks since boot: with the pid, unique until the next boot."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses and may itself hold spaces and parentheses.
    return int(fields.rpartition(")")[2].split()[19])


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
