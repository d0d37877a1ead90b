"""The transport ``nccl`` on the trainer's side: one broadcast to the receivers of all nodes.

Ray carries the calls (begin, take part, discard), the broadcast the bytes. Without the server's
receiver there is no push; a receiver of another node that does not answer at the beginning is left
out, and the server brings that node what it lacks. One that fails on the way ends the push.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray

from shared.collective import (
    SENDER_RANK,
    BroadcastBackend,
    BroadcastBrokenError,
    Invitation,
    Seat,
    choose_gpus,
)
from shared.collective_group import BroadcastGroup, Meeting, gpu_in_use
from shared.config.weights import WeightsConfig
from shared.errors import WeightTransferError
from shared.schemas.weights import WeightManifest
from shared.segment_writer import SegmentLayout, TensorSpec, lay_out, write_tensors
from trainer.broadcast import BroadcastBuckets
from trainer.outbox import Produce, Written
from trainer.ray_transport import find_receiver, get_answer
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)

_SETTLE_S = 2.0
"""After a broadcast broke off, receivers that know why have said so."""


@dataclass(kw_only=True, slots=True)
class _Receiver:
    """One that has made room for what is about to be sent."""

    name: str
    actor: Any
    upload_id: str
    segment: str
    gpus: tuple[str, ...]
    outcome: Any = None
    """The reference of its part in the broadcast."""


class CollectiveOutbox:
    """Implements ``outbox.Outbox``."""

    def __init__(self, config: WeightsConfig, client: RolloutClient) -> None:
        self._config = config
        self._client = client
        self._receivers: list[_Receiver] = []
        self.backend: BroadcastBackend | None = None
        """Of the latest broadcast."""

    def write(
        self,
        version: int,
        specs: Sequence[TensorSpec],
        produce: Produce,
        *,
        base: str | None = None,
    ) -> Written:
        # Always everything: the base is on other nodes.
        layout = lay_out(specs)
        self._begin(version, layout.num_bytes)
        address = str(ray.util.get_node_ip_address())
        meeting = Meeting(address, self._config.bucket_timeout_s)
        seats = self._seats(version, layout.num_bytes, address, meeting.port)
        for receiver, seat in zip(self._receivers, seats[1:], strict=True):
            receiver.outcome = receiver.actor.receive.remote(receiver.upload_id, seat)
        try:
            entries = self._broadcast(layout, produce, seats[SENDER_RANK], meeting)
        except WeightTransferError as exc:
            raise self._explained(exc) from exc
        limit_s = self._config.bucket_timeout_s
        what = f"complete version {version} within weights.bucket_timeout_s {limit_s:g}"
        deadline_s = monotonic() + limit_s
        for receiver in self._receivers:
            left_s = max(0.0, deadline_s - monotonic())
            _answer(receiver, receiver.outcome, left_s, what)
        manifest = WeightManifest(segment=self._receivers[0].segment, tensors=entries)
        return Written(manifest, layout.num_bytes)

    def discard(self) -> None:
        receivers, self._receivers = self._receivers, []
        calls = [receiver.actor.discard.remote(receiver.upload_id) for receiver in receivers]
        limit_s = self._config.bucket_timeout_s
        what = f"discard a segment within weights.bucket_timeout_s {limit_s:g}"
        deadline_s = monotonic() + limit_s
        for receiver, call in zip(receivers, calls, strict=True):
            try:
                _answer(receiver, call, max(0.0, deadline_s - monotonic()), what)
            except WeightTransferError as exc:
                LOGGER.warning("%s; it removes it later", exc.message)

    def _begin(self, version: int, num_bytes: int) -> None:
        """Have everybody make room."""
        # Asked each time: a server that was started again has other receivers.
        weights = self._client.weights()
        limit_s = self._config.stage_timeout_s
        deadline_s = monotonic() + limit_s
        what = f"begin version {version} within weights.stage_timeout_s {limit_s:g}"
        calls: list[tuple[str, Any, Any, Any]] = []
        for name in (weights.receiver, *weights.node_receivers):
            try:
                actor = find_receiver(name, self._config)
            except WeightTransferError as exc:
                self._leave_out(not calls, name, exc)
            else:
                begun = actor.begin.remote(version, num_bytes)
                calls.append((str(name), actor, begun, actor.gpus.remote()))
        for name, actor, begun, gpus in calls:
            try:
                left_s = max(0.0, deadline_s - monotonic())
                upload_id, segment = get_answer(begun, left_s, what)
                left_s = max(0.0, deadline_s - monotonic())
                receiver = _Receiver(
                    name=name,
                    actor=actor,
                    upload_id=upload_id,
                    segment=segment,
                    gpus=get_answer(gpus, left_s, what),
                )
            except WeightTransferError as exc:  # what it may have begun, it removes later
                self._leave_out(name == calls[0][0], name, exc)
            else:
                self._receivers.append(receiver)

    def _leave_out(self, is_servers: bool, name: str | None, exc: WeightTransferError) -> None:
        """Only the server's own receiver has to take part."""
        if is_servers:
            raise exc
        LOGGER.warning("%s takes no part, the server brings it there: %s", name, exc.message)

    def _seats(self, version: int, num_bytes: int, address: str, port: int) -> list[Seat]:
        gpus = choose_gpus([gpu_in_use(), *(receiver.gpus for receiver in self._receivers)])
        self.backend = BroadcastBackend.GLOO if gpus is None else BroadcastBackend.NCCL
        num_members = 1 + len(self._receivers)
        invitation = Invitation(
            key=uuid.uuid4().hex,
            address=address,
            port=port,
            num_members=num_members,
            backend=self.backend,
            version=version,
            segment=self._receivers[0].segment,
            num_bytes=num_bytes,
            piece_bytes=self._config.piece_bytes,
            bucket_timeout_s=self._config.bucket_timeout_s,
            transfer_timeout_s=self._config.transfer_timeout_s,
        )
        return [
            Seat(invitation=invitation, rank=rank, gpu=None if gpus is None else gpus[rank])
            for rank in range(num_members)
        ]

    def _broadcast(
        self, layout: SegmentLayout, produce: Produce, seat: Seat, meeting: Meeting
    ) -> Any:
        group = BroadcastGroup(seat, meeting.store)
        try:
            buckets = BroadcastBuckets(group, seat.invitation, self._check)
            entries = write_tensors(layout, produce, buckets.write)
            buckets.flush()
        finally:
            group.close()  # also when interrupted: receivers notice, and leave nothing
        return entries

    def _check(self, patience_s: float = 0.0) -> None:
        """
        Raises:
            WeightTransferError: a receiver has failed.
        """
        outcomes = {receiver.outcome: receiver for receiver in self._receivers}
        ended, _ = ray.wait(list(outcomes), num_returns=len(outcomes), timeout=patience_s)
        failures = []
        for outcome in ended:
            try:
                _answer(outcomes[outcome], outcome, 0.0, "take part in the broadcast")
            except WeightTransferError as exc:
                failures.append(exc)
        if failures:  # of who ended it rather than of those that saw it end
            raise min(failures, key=lambda exc: isinstance(exc, BroadcastBrokenError))

    def _explained(self, exc: WeightTransferError) -> WeightTransferError:
        """What broke a broadcast, by a receiver that knows; else as it was seen from here."""
        if not isinstance(exc, BroadcastBrokenError):
            return exc
        try:
            self._check(_SETTLE_S)
        except BroadcastBrokenError as seen:
            return type(exc)(f"{exc.message}; {seen.message}")
        except WeightTransferError as cause:
            return cause
        return exc


def _answer(receiver: _Receiver, reference: Any, limit_s: float, what: str) -> Any:
    try:
        return get_answer(reference, limit_s, what)
    except WeightTransferError as exc:
        raise type(exc)(f"receiver {receiver.name}: {exc.message}", exc.param) from exc
