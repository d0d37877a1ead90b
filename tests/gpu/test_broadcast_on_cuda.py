"""A broadcast over NCCL: the sender on one GPU, receivers on others, each in a process."""

from __future__ import annotations

import multiprocessing
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout_server.weights.transports.broadcast_receiver import BroadcastReceiver
from shared.collective import BroadcastBackend, BroadcastBrokenError, Invitation, Seat
from shared.collective_group import BroadcastGroup, Meeting, usable_gpus
from trainer.broadcast import BroadcastBuckets

pytestmark = pytest.mark.gpu

PIECE_BYTES = 1 << 20
DATA = np.random.default_rng(0).integers(0, 256, 5 * PIECE_BYTES + 77, np.uint8)
ADDRESS = "127.0.0.1"
MAX_RECEIVERS = 3


def receive(directory: str, seat: Seat) -> None:
    receiver = BroadcastReceiver(directory, idle_limit_s=60, kept_limit_s=60)
    upload_id, _ = receiver.begin(1, len(DATA))
    try:
        receiver.receive(upload_id, seat)
    except BroadcastBrokenError as exc:
        Path(directory, "error").write_text(exc.message)
        return
    path = receiver.delivered(seat.invitation.segment)
    assert path is not None
    Path(directory, "received").write_bytes(Path(path).read_bytes())
    receiver.close()


class Members:
    """Receivers in processes, and the sender's end here."""

    def __init__(self, directory: Path, *, bucket_timeout_s: float) -> None:
        gpus = usable_gpus()[: 1 + MAX_RECEIVERS]
        if len(gpus) < 2:
            pytest.skip("NCCL takes no GPU twice: two are needed")
        meeting = Meeting(ADDRESS, 60.0)
        self.invitation = Invitation(
            key=uuid.uuid4().hex,
            address=ADDRESS,
            port=meeting.port,
            num_members=len(gpus),
            backend=BroadcastBackend.NCCL,
            version=1,
            segment="slipstream-weights-1-v1.safetensors",
            num_bytes=len(DATA),
            piece_bytes=PIECE_BYTES,
            bucket_timeout_s=bucket_timeout_s,
            transfer_timeout_s=bucket_timeout_s,
        )
        seats = [
            Seat(invitation=self.invitation, rank=rank, gpu=gpu) for rank, gpu in enumerate(gpus)
        ]
        self.directories = [directory / str(seat.rank) for seat in seats[1:]]
        context = multiprocessing.get_context("spawn")
        self.processes = []
        for place, seat in zip(self.directories, seats[1:], strict=True):
            place.mkdir()
            process = context.Process(target=receive, args=(str(place), seat))
            process.start()
            self.processes.append(process)
        self.group = BroadcastGroup(seats[0], meeting.store)

    def buckets(self) -> BroadcastBuckets:
        return BroadcastBuckets(self.group, self.invitation, lambda: None)

    def join(self) -> None:
        for process in self.processes:
            process.join()


def test_every_gpu_has_every_byte(tmp_path: Path) -> None:
    members = Members(tmp_path, bucket_timeout_s=60.0)
    buckets = members.buckets()
    buckets.write(DATA.data)
    buckets.flush()
    members.join()
    members.group.close()
    for directory in members.directories:
        assert (directory / "received").read_bytes() == DATA.tobytes()
        assert [path.name for path in directory.iterdir()] == ["received"]
    assert torch.cuda.is_available(), "the sender's CUDA context outlives the group"


def test_a_killed_member_ends_it_for_the_others_and_this_process_lives(tmp_path: Path) -> None:
    members = Members(tmp_path, bucket_timeout_s=10.0)
    buckets = members.buckets()
    buckets.write(DATA[: 2 * PIECE_BYTES].data)
    members.processes[0].kill()
    members.processes[0].join()
    with pytest.raises(BroadcastBrokenError):
        buckets.write(DATA[2 * PIECE_BYTES :].data)
    members.group.close()
    members.join()
    for directory in members.directories[1:]:
        assert [path.name for path in directory.iterdir()] == ["error"]
    torch.zeros(1, device="cuda:0").cpu()
