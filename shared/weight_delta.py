"""How a weight push says only what changed since the version before.

After an optimizer step of reinforcement learning about 99 % of the bfloat16 weights are what they
were: a change of one part in a million is less than their rounding. A delta segment is a
safetensors file with one entry of raw bytes (``U8``) per tensor that changed. The entry is a run of
pieces, one for every ``PIECE_ELEMENTS`` elements of the tensor, each of them

    counts   uint32 [blocks]    changed elements in each block of ``BLOCK_ELEMENTS``
    offsets  uint16 [changed]   where in its block, ascending
    values   [changed]          what they are now

or, where that would be longer than the piece itself, ``counts[0] == WHOLE_PIECE`` and all of the
piece's elements. No sequence of elements is too unlucky: a delta is never much longer than the
tensors. What a delta makes is checked by the digests of the resulting tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import WeightVerificationError
from shared.safetensors_file import TensorSpan, read_into

BLOCK_ELEMENTS = 1 << 16
"""So that two bytes say where in a block."""
PIECE_ELEMENTS = 1 << 18
"""Old and new of a piece stay in the processor's cache while they are compared."""
WHOLE_PIECE = 0xFFFF_FFFF
"""In the place of the first count."""
COUNT_BYTES = 4
OFFSET_BYTES = 2

Elements = npt.NDArray[Any]
"""[n] floats seen as unsigned integers of their size: equal means equal bits."""

_ELEMENT_TYPES: dict[str, Any] = {
    "F64": np.uint64,
    "I64": np.uint64,
    "F32": np.uint32,
    "I32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
    "I8": np.uint8,
    "U8": np.uint8,
    "BOOL": np.uint8,
}


def element_type(dtype: str) -> np.dtype[Any]:
    """The unsigned integer in which elements of a safetensors dtype are compared."""
    kind: np.dtype[Any] = np.dtype(_ELEMENT_TYPES[dtype])
    return kind


def num_blocks(num_elements: int) -> int:
    """Blocks of a piece."""
    return -(-num_elements // BLOCK_ELEMENTS)


def encode_piece(old: Elements, new: Elements) -> tuple[bytes, int]:
    """What turns ``old`` into ``new``.

    Args:
        old, new: [n] of one type, n at most ``PIECE_ELEMENTS``.

    Returns:
        The encoded piece, and how many elements it changes.
    """
    where = np.flatnonzero(old != new)
    if len(where) * (OFFSET_BYTES + new.itemsize) >= new.nbytes:
        counts = np.zeros(num_blocks(len(new)), dtype="<u4")
        counts[0] = WHOLE_PIECE
        return counts.tobytes() + new.tobytes(), len(where)
    starts = np.arange(num_blocks(len(new)) + 1) * BLOCK_ELEMENTS
    counts = np.diff(np.searchsorted(where, starts)).astype("<u4")
    offsets = (where & (BLOCK_ELEMENTS - 1)).astype("<u2")
    return counts.tobytes() + offsets.tobytes() + new[where].tobytes(), len(where)


class PieceReader:
    """Applies the pieces of one tensor, in order, to what they were made from."""

    def __init__(self, name: str, descriptor: int, span: TensorSpan, path: str) -> None:
        """
        Args:
            name: of the tensor, for errors.
            descriptor: the open delta file, at ``path``.
            span: the tensor's entry in it.
        """
        self._name = name
        self._descriptor = descriptor
        self._position = span.start
        self._end = span.end
        self._path = path

    def apply_next(self, elements: Elements) -> None:
        """Change a piece in place.

        Args:
            elements: [n] of the base; writable.

        Raises:
            WeightVerificationError: the piece is cut short or points outside of itself. What
                ``elements`` holds then is of no use.
        """
        counts = self._take(num_blocks(len(elements)), np.dtype("<u4"))
        if counts[0] == WHOLE_PIECE:
            elements[:] = self._take(len(elements), elements.dtype)
            return
        num_changed = int(counts.sum(dtype=np.uint64))
        if num_changed > len(elements):
            raise self._damaged(f"changes {num_changed} of {len(elements)} elements")
        offsets = self._take(num_changed, np.dtype("<u2"))
        starts = np.arange(len(counts), dtype=np.int64) * BLOCK_ELEMENTS
        where = np.repeat(starts, counts) + offsets
        if num_changed and int(where.max()) >= len(elements):
            raise self._damaged(f"changes element {int(where.max())} of {len(elements)}")
        elements[where] = self._take(num_changed, elements.dtype)

    def finish(self) -> None:
        """
        Raises:
            WeightVerificationError: there is more than the tensor has pieces.
        """
        if self._position != self._end:
            raise self._damaged(f"is {self._end - self._position} bytes too long")

    def _take(self, count: int, dtype: np.dtype[Any]) -> Elements:
        end = self._position + count * dtype.itemsize
        if end > self._end:
            raise self._damaged(f"is {end - self._end} bytes too short")
        taken = np.empty(count, dtype=dtype)
        if count:  # memoryview cannot cast a view with a zero in its shape
            read_into(self._descriptor, taken.data.cast("B"), self._position, self._path)
        self._position = end
        return taken

    def _damaged(self, what: str) -> WeightVerificationError:
        return WeightVerificationError(
            f"delta of tensor {self._name!r} {what}", param="manifest.segment"
        )
