"""Brings the shards of an FSDP2 policy to the rank that publishes, a piece of a tensor at a time.

Rank 0 leads: it writes the segment and asks for what it needs next. The others follow: they answer
until they are told how the push ended.

::

    leader                                  follower
    PIECE(tensor, first element, count) ──► round that part of the local shard, send it
    WHOLE(tensor)                       ──► take part in gathering one full tensor
    DONE(version) or FAILED(message)    ──► the outcome, also of what only the leader saw

What FSDP2 shards by rows lies in the file as the local shards one after the other, so no rank ever
holds a whole tensor: the leader one piece more than without sharding, a follower one piece. Other
layouts are gathered by torch, one full tensor at a time, on every rank. Weights are rounded to the
served dtype before they are sent: rounding is element by element, so the bytes are the same, and
half as many.

Everything goes through a gloo group of its own: it needs no memory of a GPU, its timeouts hold, and
a rank that died is noticed at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from shared.errors import SlipstreamError, WeightTransferError

LEADER_RANK = 0
_ORDER_LENGTH = 4

ServedTensor = tuple[Any, torch.dtype]
"""A tensor of the policy, sharded or not, and the dtype it is served in."""


class Order(IntEnum):
    """What the leader asks of a follower."""

    PIECE = 0
    WHOLE = 1
    DONE = 2
    FAILED = 3


class ShardGroup:
    """All ranks of a sharded policy. To be made by all of them at the same point."""

    def __init__(self, *, piece_timeout_s: float = 60.0, outcome_timeout_s: float = 1800.0) -> None:
        """
        Args:
            piece_timeout_s: longest wait of the leader for a follower's piece.
            outcome_timeout_s: longest wait of a follower for the next order. The leader gives none
                while the server works on the push, so this is at least ``trainer.api_timeout_s``.
        """
        self._piece_timeout_s = piece_timeout_s
        self._outcome_timeout_s = outcome_timeout_s
        self._group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=max(piece_timeout_s, outcome_timeout_s))
        )
        self.rank = dist.get_rank()
        self._followers = [r for r in range(dist.get_world_size()) if r != LEADER_RANK]
        self._places: dict[int, tuple[int, torch.dtype]] = {}

    @property
    def is_leader(self) -> bool:
        return self.rank == LEADER_RANK

    def push(self, tensors: Sequence[ServedTensor], publish: Callable[[], int]) -> int:
        """The version that all ranks agree is committed. Called by every rank.

        Args:
            tensors: what is served, the same on every rank and in the same order.
            publish: writes and announces; called on the leader only. It may ask for pieces of
                sharded ``tensors`` any number of times, or not at all.

        Raises:
            SlipstreamError: the leader's own failure; on the others one with its message.
            WeightTransferError: a rank went away or did not answer in time.
        """
        if not self.is_leader:
            return self._follow(tensors)
        self._places = {
            _key(tensor): (index, dtype)
            for index, (tensor, dtype) in enumerate(tensors)
            if isinstance(tensor, DTensor)
        }
        try:
            version = publish()
        except BaseException as exc:  # whatever it is, the other ranks must not wait for it
            self._tell_failure(exc)
            raise
        finally:
            self._places = {}
        self._order(self._followers, Order.DONE, version)
        return version

    def pieces(self, tensor: DTensor, piece_bytes: int) -> Iterator[torch.Tensor]:
        """The full tensor, flat, rounded and on the CPU. On the leader, inside ``push``.

        Raises:
            WeightTransferError: a rank does not answer, or the tensor is not one of the push.
        """
        index, dtype = self._places.get(_key(tensor), (None, tensor.dtype))
        if index is None:
            raise WeightTransferError(
                f"a sharded tensor of shape {list(tensor.shape)} was asked for outside of a push "
                "of all ranks (Policy.push_together)"
            )
        holders = _holders(tensor)
        if holders is None:
            self._order(self._followers, Order.WHOLE, index)
            yield from rounded_pieces(tensor.to(dtype).full_tensor(), dtype, piece_bytes)
            return
        for rank, num_elements in zip(
            holders, elements_per_rank(tensor.shape, len(holders)), strict=True
        ):
            if rank == LEADER_RANK:
                yield from rounded_pieces(tensor.to_local(), dtype, piece_bytes)
                continue
            step = max(piece_bytes // dtype.itemsize, 1)
            for start in range(0, num_elements, step):
                piece = torch.empty(min(step, num_elements - start), dtype=dtype)
                self._order([rank], Order.PIECE, index, start, piece.numel())
                self._receive(piece, rank, self._piece_timeout_s, "a piece of a tensor")
                yield piece

    def _follow(self, tensors: Sequence[ServedTensor]) -> int:
        order = torch.empty(_ORDER_LENGTH, dtype=torch.int64)
        while True:
            self._receive(order, LEADER_RANK, self._outcome_timeout_s, "the next order")
            kind, value, start, count = order.tolist()
            match Order(kind):
                case Order.PIECE:
                    tensor, dtype = tensors[value]
                    local = tensor.to_local().reshape(-1)[start : start + count]
                    self._send(local.to(device="cpu", dtype=dtype), [LEADER_RANK])
                case Order.WHOLE:
                    tensor, dtype = tensors[value]
                    tensor.to(dtype).full_tensor()
                case Order.DONE:
                    return value
                case Order.FAILED:
                    text = torch.empty(value, dtype=torch.uint8)
                    self._receive(text, LEADER_RANK, self._piece_timeout_s, "the error's text")
                    message = text.numpy().tobytes().decode(errors="replace")
                    raise WeightTransferError(f"rank {LEADER_RANK} did not publish: {message}")

    def _tell_failure(self, error: BaseException) -> None:
        message = str(error) if isinstance(error, SlipstreamError) else repr(error)
        text = torch.frombuffer(bytearray(message.encode() or b"?"), dtype=torch.uint8)
        for rank in self._followers:
            # One at a time: a rank that is gone, often the cause, must not hide it from the others.
            with contextlib.suppress(WeightTransferError):
                self._order([rank], Order.FAILED, text.numel())
                self._send(text, [rank])

    def _order(
        self, ranks: Sequence[int], kind: Order, value: int, start: int = 0, count: int = 0
    ) -> None:
        self._send(torch.tensor([kind, value, start, count], dtype=torch.int64), ranks)

    def _send(self, data: torch.Tensor, ranks: Sequence[int]) -> None:
        with self._mapped(f"to send to rank {ranks}", self._piece_timeout_s) as timeout:
            for work in [dist.isend(_as_bytes(data), rank, group=self._group) for rank in ranks]:
                work.wait(timeout)

    def _receive(self, into: torch.Tensor, rank: int, timeout_s: float, what: str) -> None:
        with self._mapped(f"to get {what} from rank {rank}", timeout_s) as timeout:
            dist.irecv(_as_bytes(into), rank, group=self._group).wait(timeout)

    @contextlib.contextmanager
    def _mapped(self, what: str, timeout_s: float) -> Iterator[timedelta]:
        try:
            yield timedelta(seconds=timeout_s)
        except RuntimeError as exc:  # gloo's only type of error
            raise WeightTransferError(
                f"rank {self.rank} failed {what} within {timeout_s:g} s: {str(exc).splitlines()[0]}"
            ) from exc


def rounded_pieces(
    tensor: torch.Tensor, dtype: torch.dtype, piece_bytes: int
) -> Iterator[torch.Tensor]:
    """A plain tensor, flat, in ``dtype`` and on the CPU, at most ``piece_bytes`` at a time."""
    for piece in tensor.reshape(-1).split(max(piece_bytes // dtype.itemsize, 1)):
        yield piece.to(device="cpu", dtype=dtype)


def _key(tensor: DTensor) -> int:
    """Tells the leader's tensors apart: its shards are the first ones, so none of them is empty
    unless the whole tensor is."""
    return int(tensor.to_local().data_ptr())


def _holders(tensor: DTensor) -> list[int] | None:
    """The ranks whose local shards are the tensor, in order; None where they are not its rows."""
    mesh, placements = tensor.device_mesh, tensor.placements
    split = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(split) != 1 or not isinstance(placements[split[0]], Shard) or placements[split[0]].dim:
        return None
    # Of replicas, the leader's own.
    place: list[int | slice] = list(mesh.get_coordinate())
    place[split[0]] = slice(None)
    return list(mesh.mesh[tuple(place)].tolist())


def elements_per_rank(shape: torch.Size, num_ranks: int) -> list[int]:
    """What ``torch.chunk`` gives each rank of the first dimension: the last ones may get less."""
    num_rows, row = shape[0], shape[1:].numel()
    chunk = -(-num_rows // num_ranks)
    return [
        row * (min(num_rows, (rank + 1) * chunk) - min(num_rows, rank * chunk))
        for rank in range(num_ranks)
    ]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)  # gloo does not know every dtype
