"""A broadcast over gloo within this process: one sender, receivers in threads, real files."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from rollout_server.weights.transports.broadcast_receiver import BroadcastReceiver
from shared.collective import (
    BroadcastBackend,
    BroadcastBrokenError,
    Invitation,
    Seat,
    check_announcement,
    choose_gpus,
)
from shared.collective_group import BroadcastGroup, Meeting
from shared.config.run import RunConfig
from shared.config.weights import WeightsConfig
from shared.errors import SlipstreamError, WeightTransferError
from trainer.broadcast import BroadcastBuckets

PIECE_BYTES = 1000
DATA = np.random.default_rng(0).integers(0, 256, 5 * PIECE_BYTES + 77, np.uint8)
ADDRESS = "127.0.0.1"
SEGMENT = "slipstream-weights-1-v3.safetensors"


class Broadcast:
    """A meeting, and receivers that wait in threads for what the test sends."""

    def __init__(self, directory: Path, num_receivers: int, *, absent: int = 0) -> None:
        self.meeting = Meeting(ADDRESS, 10.0)
        self.invitation = Invitation(
            key=uuid.uuid4().hex,
            address=ADDRESS,
            port=self.meeting.port,
            num_members=1 + num_receivers + absent,
            backend=BroadcastBackend.GLOO,
            version=3,
            segment=SEGMENT,
            num_bytes=len(DATA),
            piece_bytes=PIECE_BYTES,
            bucket_timeout_s=1.0 if absent else 20.0,
            transfer_timeout_s=20.0,
        )
        self.directories = [directory / str(i) for i in range(num_receivers)]
        self.receivers = []
        self.errors: list[SlipstreamError | None] = [None] * num_receivers
        self._threads = []
        for index, place in enumerate(self.directories):
            place.mkdir()
            receiver = BroadcastReceiver(str(place), idle_limit_s=60, kept_limit_s=60)
            self.receivers.append(receiver)
            upload_id, _ = receiver.begin(3, len(DATA))
            thread = threading.Thread(target=self._receive, args=(index, upload_id), daemon=True)
            thread.start()
            self._threads.append(thread)

    def join(self) -> BroadcastGroup:
        """The sender's end."""
        return BroadcastGroup(Seat(invitation=self.invitation, rank=0), self.meeting.store)

    def buckets(
        self, group: BroadcastGroup, check: Callable[[], None] = lambda: None
    ) -> BroadcastBuckets:
        return BroadcastBuckets(group, self.invitation, check)

    def outcomes(self) -> list[SlipstreamError | None]:
        for thread in self._threads:
            thread.join()
        return self.errors

    def files(self) -> list[list[str]]:
        return [sorted(path.name for path in place.iterdir()) for place in self.directories]

    def _receive(self, index: int, upload_id: str) -> None:
        seat = Seat(invitation=self.invitation, rank=1 + index)
        try:
            self.receivers[index].receive(upload_id, seat)
        except SlipstreamError as exc:
            self.errors[index] = exc


def test_every_receiver_has_every_byte(tmp_path: Path) -> None:
    broadcast = Broadcast(tmp_path, 3)
    group = broadcast.join()
    buckets = broadcast.buckets(group)
    # In parts that have nothing to do with buckets.
    for start in range(0, len(DATA), 1234):
        buckets.write(DATA[start : start + 1234].data)
    buckets.flush()
    assert broadcast.outcomes() == [None] * 3
    group.close()
    for receiver, directory in zip(broadcast.receivers, broadcast.directories, strict=True):
        path = receiver.delivered(SEGMENT)
        assert path is not None
        assert Path(path).parent == directory
        assert Path(path).read_bytes() == DATA.tobytes()
        assert receiver.delivered("slipstream-weights-2-v3.safetensors") is None
    broadcast.receivers[0].close()
    assert broadcast.receivers[0].delivered(SEGMENT) is None


def test_a_sender_that_leaves_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    broadcast = Broadcast(tmp_path, 2)
    group = broadcast.join()
    buckets = broadcast.buckets(group)
    buckets.write(DATA[: 3 * PIECE_BYTES].data)
    group.close()
    for error in broadcast.outcomes():
        assert isinstance(error, BroadcastBrokenError)
        assert "a member is gone" in error.message
    assert broadcast.files() == [[], []]
    assert broadcast.receivers[0].delivered(SEGMENT) is None


@pytest.mark.parametrize(
    ("offset", "num_bytes", "message"),
    [
        (PIECE_BYTES, PIECE_BYTES + 1, "a bucket of 1001 bytes is announced at byte 1000, at most"),
        (0, PIECE_BYTES, "a bucket starts at byte 0, byte 1000 is next"),
    ],
    ids=["longer than the memory for it", "repeated"],
)
def test_what_is_not_due_is_refused_before_it_comes(
    tmp_path: Path, offset: int, num_bytes: int, message: str
) -> None:
    broadcast = Broadcast(tmp_path, 2)
    group = broadcast.join()
    group.send(0, DATA[:PIECE_BYTES])()
    wait = group.send(offset, DATA[:num_bytes])
    for error in broadcast.outcomes():
        assert error is not None
        assert message in error.message
    assert broadcast.files() == [[], []]
    group.close()
    with pytest.raises(WeightTransferError):
        group.send(0, DATA[:1])
    del wait


def test_a_member_that_does_not_come_ends_it_for_all_in_bounded_time(tmp_path: Path) -> None:
    broadcast = Broadcast(tmp_path, 2, absent=1)
    message = r"its 4 members did not meet within weights.bucket_timeout_s 1"
    with pytest.raises(BroadcastBrokenError, match=message):
        broadcast.join()
    assert all(isinstance(error, BroadcastBrokenError) for error in broadcast.outcomes())
    assert broadcast.files() == [[], []]


def test_a_receiver_that_is_superseded_says_why(tmp_path: Path) -> None:
    broadcast = Broadcast(tmp_path, 2)
    group = broadcast.join()
    buckets = broadcast.buckets(group)
    buckets.write(DATA[: 2 * PIECE_BYTES].data)
    upload_id, _ = broadcast.receivers[1].begin(3, len(DATA))
    # What the sender sees of it depends on how much of the rest is on its way already.
    with contextlib.suppress(BroadcastBrokenError):
        buckets.write(DATA[2 * PIECE_BYTES :].data)
        buckets.flush()
    _, second = broadcast.outcomes()
    group.close()
    assert second is not None
    assert "another trainer began one" in second.message
    assert not isinstance(second, BroadcastBrokenError)
    assert [name.endswith(".partial") for name in broadcast.files()[1]] == [True], "the other's"
    broadcast.receivers[1].discard(upload_id)
    assert broadcast.files()[1] == []


def test_a_version_of_another_length_is_not_sent(tmp_path: Path) -> None:
    broadcast = Broadcast(tmp_path, 1)
    group = broadcast.join()
    buckets = broadcast.buckets(group)
    buckets.write(DATA[:-1].data)
    with pytest.raises(WeightTransferError, match="has 5076 bytes, announced were 5077"):
        buckets.flush()
    with pytest.raises(WeightTransferError, match="goes on to byte 6076, announced were 5077"):
        buckets.write(DATA[:PIECE_BYTES].data)
    group.close()
    assert broadcast.outcomes()[0] is not None
    assert broadcast.files() == [[]]


def test_receivers_are_asked_before_every_bucket(tmp_path: Path) -> None:
    broadcast = Broadcast(tmp_path, 1)
    group = broadcast.join()
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise WeightTransferError("one is gone")

    with pytest.raises(WeightTransferError, match="one is gone"):
        broadcast.buckets(group, check).write(DATA.data)
    group.close()
    assert broadcast.outcomes()[0] is not None


def test_each_member_gets_a_gpu_of_its_own_or_gloo_is_taken() -> None:
    assert choose_gpus([("a",), ("a", "b"), ("c",)]) == ["a", "b", "c"]
    assert choose_gpus([("a",), ("a",)]) is None, "trainer and server share the only GPU"
    assert choose_gpus([("a",), ()]) is None
    assert choose_gpus([(), ("a",)]) is None, "a trainer on the CPU"


@pytest.mark.parametrize(
    ("position", "offset", "length"),
    [(0, 1, 10), (5000, 5000, 78), (0, 0, 0), (0, 0, -1), (0, 0, PIECE_BYTES + 1)],
)
def test_only_the_next_bucket_may_be_announced(
    tmp_path: Path, position: int, offset: int, length: int
) -> None:
    invitation = Broadcast(tmp_path, 0).invitation
    check_announcement(invitation, 5000, 5000, 77)
    with pytest.raises(WeightTransferError, match="the broadcast of version 3 ends"):
        check_announcement(invitation, position, offset, length)


def test_ipc_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match=r"cannot be verified before engines load it"):
        WeightsConfig.model_validate({"transport": "ipc"})


def test_what_a_broadcast_did_not_bring_has_to_fit_into_the_object_store() -> None:
    settings = {"transport": "nccl", "bucket_mib": 300}
    with pytest.raises(ValidationError, match=r"transport nccl needs room for two buckets"):
        RunConfig.model_validate(
            {
                "model": {"path": "m"},
                "weights": settings,
                "ray": {"object_store_mib": 599},
            }
        )
    nccl, ray = (WeightsConfig.model_validate({"transport": kind}) for kind in ("nccl", "ray"))
    assert nccl.longest_push_s == ray.longest_push_s + nccl.stage_timeout_s
