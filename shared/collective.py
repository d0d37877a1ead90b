"""What the members of a broadcast (``weights.transport: nccl``) agree on before a byte is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.errors import WeightTransferError

SENDER_RANK = 0


class BroadcastBrokenError(WeightTransferError):
    """A member is gone or late, as the others see it: who it is and why, only it may know."""


class BroadcastBackend(StrEnum):
    """What carries the bytes, in torch.distributed's words."""

    NCCL = "nccl"
    """From GPU to GPU."""
    GLOO = "gloo"
    """From host memory to host memory, over TCP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """One broadcast. The sender is rank 0 and keeps the store where all of them meet."""

    key: str
    """Of this broadcast in the store: who does not know it meets nobody."""
    address: str
    port: int
    num_members: int
    backend: BroadcastBackend
    version: int
    segment: str
    """Under which the server will hear of what is sent."""
    num_bytes: int
    piece_bytes: int
    """The longest bucket: none is announced to be longer."""
    bucket_timeout_s: float
    """For all members to meet, and for a bucket to arrive."""
    transfer_timeout_s: float
    """How long a receiver waits for the sender to make the next bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A member's place in a broadcast."""

    invitation: Invitation
    rank: int
    gpu: str | None = None
    """UUID of the GPU it takes part with; None under gloo."""


def choose_gpus(gpus: Sequence[Sequence[str]]) -> list[str] | None:
    """A GPU of its own for every member, in their order; None where gloo has to do it.

    NCCL takes no GPU twice. A sender has one and stands first; receivers have those of their hosts.
    """
    chosen: list[str] = []
    for choices in gpus:
        free = [gpu for gpu in choices if gpu not in chosen]
        if not free:
            return None
        chosen.append(free[0])
    return chosen


def check_announcement(invitation: Invitation, position: int, offset: int, length: int) -> None:
    """Whether an announced bucket may be received.

    Bytes that are longer than the memory that waits for them end a whole gloo process, so it is
    refused before it comes.

    Raises:
        WeightTransferError: it is not the next one, or longer than it may be.
    """
    longest = min(invitation.piece_bytes, invitation.num_bytes - position)
    if offset != position:
        problem = f"a bucket starts at byte {offset}, byte {position} is next"
    elif not 0 < length <= longest:
        problem = f"a bucket of {length} bytes is announced at byte {offset}, at most {longest} fit"
    else:
        return
    raise WeightTransferError(f"the broadcast of version {invitation.version} ends: {problem}")
