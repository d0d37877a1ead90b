"""Weights from whatever a trainer holds: numpy arrays or torch tensors, as one segment.

Neither torch nor numpy is imported for it: a torch tensor brings its own module along, and numpy is
needed by the writer only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import WeightTransferError
from shared.schemas.weights import PublishRequest, PublishResponse

if TYPE_CHECKING:
    from shared.segment_writer import TensorBuffer

Tensor = Any
"""A numpy array (of bfloat16 too, as ``ml_dtypes`` has it) or a torch tensor on any device."""

DEFAULT_DIRECTORY = "/dev/shm"
PIECE_BYTES = 1 << 25
"""Of a tensor, rounded and on the CPU at a time."""

_SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_FLOATING_POINT = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPush:
    """One push as the trainer saw it."""

    version: int
    num_bytes: int
    push_s: float
    """From the first byte written to the server's answer."""
    answer: PublishResponse
    """A push whose first answer got lost is repeated, and answered again without its timings."""

    @classmethod
    def of(cls, request: PublishRequest, answer: PublishResponse, *, push_s: float) -> WeightPush:
        """From what was sent and what came back."""
        num_bytes = sum(entry.num_bytes for entry in request.manifest.tensors)
        return cls(version=request.version, num_bytes=num_bytes, push_s=push_s, answer=answer)


def write_push(
    tensors: Mapping[str, Tensor],
    *,
    version: int,
    base_version: int,
    dtype: str | None,
    directory: str,
) -> PublishRequest:
    """Write the segment; the request that announces it. ``remove_push`` takes it away again.

    Raises:
        WeightTransferError: the version does not go up, a dtype cannot be pushed, or there is no
            room for the file.
    """
    from shared.segment_writer import TensorSpec, write_segment
    from shared.weights import segment_name, sweep_stale_segments

    if version <= base_version:
        raise WeightTransferError(
            f"version {version} must be above its base version {base_version}"
        )
    if dtype is not None and dtype not in _FLOATING_POINT:
        raise WeightTransferError(f"dtype {dtype!r} is not one of {', '.join(_FLOATING_POINT)}")
    sweep_stale_segments(directory)  # of trainers that were killed: memory that nobody else frees
    specs = [
        TensorSpec(name, _safetensors_dtype(name, tensor, dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    path = Path(directory) / segment_name(os.getpid(), version)
    # A name left behind by an interrupted push of this very process would refuse the write.
    path.unlink(missing_ok=True)
    manifest = write_segment(
        path, specs, lambda spec: _pieces(tensors[spec.name], dtype), takes_spare=True
    )
    return PublishRequest(version=version, base_version=base_version, manifest=manifest)


def remove_push(request: PublishRequest, directory: str) -> None:
    """Remove the trainer's name of the file; the server has its own."""
    (Path(directory) / request.manifest.segment).unlink(missing_ok=True)


def _safetensors_dtype(name: str, tensor: Tensor, dtype: str | None) -> str:
    own = str(tensor.dtype).rpartition(".")[2]  # "torch.bfloat16" or "bfloat16"
    pushed = dtype if dtype is not None and own in _FLOATING_POINT else own
    if pushed not in _SAFETENSORS_DTYPES:
        raise WeightTransferError(
            f"tensor {name!r} is of {own}, which cannot be pushed; can be: "
            f"{', '.join(_SAFETENSORS_DTYPES)}"
        )
    if pushed == "bfloat16" and own != pushed and not _is_torch(tensor):
        raise WeightTransferError(
            f"tensor {name!r}: numpy cannot round to bfloat16; give a torch tensor or an array of "
            "ml_dtypes.bfloat16"
        )
    return _SAFETENSORS_DTYPES[pushed]


def _pieces(tensor: Tensor, dtype: str | None) -> Iterator[TensorBuffer]:
    """The tensor's bytes in the pushed dtype, at most ``PIECE_BYTES`` or so at a time."""
    flat = tensor.detach().reshape(-1) if _is_torch(tensor) else tensor.reshape(-1)
    own = str(flat.dtype).rpartition(".")[2]
    pushed = dtype if dtype is not None and own in _FLOATING_POINT else own
    num_elements = max(PIECE_BYTES // flat.itemsize, 1)
    for start in range(0, len(flat), num_elements):
        piece = flat[start : start + num_elements]
        if _is_torch(tensor):
            torch = sys.modules["torch"]
            piece = piece.to(device="cpu", dtype=getattr(torch, pushed)).contiguous()
            # numpy has no bfloat16; only the bytes matter.
            yield piece.view(torch.uint8).numpy()
        else:
            yield piece.astype(pushed, copy=False).view("uint8")


def _is_torch(tensor: Tensor) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)
