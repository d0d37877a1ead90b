"""Weight segments: the safetensors files in which a trainer hands a policy to the server.

A segment's name carries its owner, so that whoever comes next can tell a file in use from one left
behind by a process that died (``sweep_stale_segments``). ``segment_writer`` writes them.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path

import xxhash

from shared.process_identity import boot_id, pid_namespace, process_start_ticks
from shared.safetensors_file import (
    DTYPE_NUM_BYTES,
    TensorSpan,
    open_regular_file,
    read_header,
    read_header_at,
    read_range,
)
from shared.schemas.weights import TensorEntry, WeightManifest
from shared.segment_writer import PARTIAL_SUFFIX, TensorSource, write_safetensors
from shared.weight_claims import CLAIM_SUFFIX, is_claimed, remove_claim, segment_of

__all__ = [
    "DTYPE_NUM_BYTES",
    "PARTIAL_SUFFIX",
    "SegmentKind",
    "TensorSource",
    "TensorSpan",
    "build_manifest",
    "read_header",
    "segment_name",
    "sweep_stale_segments",
    "write_safetensors",
]

_SEGMENT_NAME = re.compile(
    r"slipstream-(?:weights|server|node|spare)-(?P<pid>[0-9]+)"
    r"(?:\.(?P<start>[0-9]+)\.(?P<namespace>[0-9]+)\.(?P<boot>[0-9a-f]+))?"
    r"-v[0-9]+\.safetensors(?:\.partial)?"
)


class SegmentKind(StrEnum):
    """Whose file it is."""

    TRAINER = "weights"
    """Written by a trainer, which removes it after the push."""
    SERVER = "server"
    """The server's hard link to a pushed file: kept while that version may be needed."""
    NODE = "node"
    """The copy of it on another node, owned by the server's actor there."""
    SPARE = "spare"
    """What the server no longer needs, for the next writer (``spare_segments``)."""


def segment_name(pid: int, version: int, kind: SegmentKind = SegmentKind.TRAINER) -> str:
    """File name of a segment owned by process ``pid``.

    ``slipstream-weights-<pid>.<process start>.<pid namespace>.<boot>-v<version>.safetensors``: the
    start time tells a reused pid from the owner, the namespace another container's pids from ours,
    the boot another host's. They are left out where the process cannot be looked up.
    """
    start = process_start_ticks(pid)
    owner = str(pid) if start is None else f"{pid}.{start}.{pid_namespace()}.{boot_id()}"
    return f"slipstream-{kind.value}-{owner}-v{version}.safetensors"


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

    Two kinds are left alone: files of other hosts and pid namespaces, whose owners cannot be seen
    from here, and what a killed server has committed, as long as its record refers to it.
    """
    removed = []
    for path in sorted(Path(directory).glob("slipstream-*")):
        owner = _SEGMENT_NAME.fullmatch(path.name.removesuffix(CLAIM_SUFFIX))
        if owner is None or _is_alive(owner):
            continue
        is_orphan = path.name.endswith(CLAIM_SUFFIX) and not segment_of(path).exists()
        if not is_orphan and (path.name.endswith(CLAIM_SUFFIX) or is_claimed(path)):
            continue
        try:
            path.unlink()
        except FileNotFoundError:
            continue  # another process swept it first
        except PermissionError:
            continue  # another user's file: theirs to sweep
        remove_claim(path)
        removed.append(path.name)
    return removed


def _is_alive(owner: re.Match[str]) -> bool:
    """Whether the owner lives, or cannot be seen from here."""
    pid, start = owner["pid"], owner["start"]
    if start is not None and (
        owner["boot"] != boot_id() or int(owner["namespace"]) != pid_namespace()
    ):
        return True
    found = process_start_ticks(int(pid))
    if found is None:
        return Path(f"/proc/{pid}").exists()
    return start is None or int(start) == found
