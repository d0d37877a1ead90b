"""The transport ``ray`` on the trainer's side: segments go to the server's node in buckets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from shared.config.weights import WeightsConfig
from shared.errors import SlipstreamError, WeightTransferError
from shared.schemas.weights import WeightManifest
from shared.segment_writer import TensorSpec, lay_out, write_tensors
from trainer.outbox import Produce, Written
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)


class RayOutbox:
    """Implements ``outbox.Outbox``."""

    def __init__(self, config: WeightsConfig, client: RolloutClient) -> None:
        self._config = config
        self._client = client
        self._upload: tuple[Any, str] | None = None
        """The receiver and its name for what is being sent."""

    def write(
        self,
        version: int,
        specs: Sequence[TensorSpec],
        produce: Produce,
        *,
        base: str | None = None,
    ) -> Written:
        # Always everything: the base is on the server's node.
        layout = lay_out(specs)
        limit_s = self._config.stage_timeout_s
        setting = f"weights.stage_timeout_s {limit_s:g}"
        # Asked each time: a server that was started again has another one.
        receiver = self._receiver()
        upload_id, segment = get_answer(
            receiver.begin.remote(version, layout.num_bytes),
            limit_s,
            f"begin version {version} within {setting}",
        )
        self._upload = (receiver, upload_id)
        buckets = _Buckets(receiver, upload_id, layout.num_bytes, self._config)
        entries = write_tensors(layout, produce, buckets.write)
        buckets.flush()
        get_answer(
            receiver.finish.remote(upload_id),
            limit_s,
            f"complete version {version} within {setting}",
        )
        manifest = WeightManifest(segment=segment, tensors=entries)
        return Written(manifest, layout.num_bytes)

    def discard(self) -> None:
        upload, self._upload = self._upload, None
        if upload is None:
            return
        receiver, upload_id = upload
        limit_s = self._config.bucket_timeout_s
        what = f"discard a segment within weights.bucket_timeout_s {limit_s:g}"
        try:
            get_answer(receiver.discard.remote(upload_id), limit_s, what)
        except WeightTransferError as exc:
            LOGGER.warning("%s; the receiver removes it later", exc.message)

    def _receiver(self) -> Any:
        return find_receiver(self._client.weights().receiver, self._config)


class _Buckets:
    """Collects bytes and sends them half a bucket at a time: one is on its way while the next
    fills."""

    def __init__(
        self, receiver: Any, upload_id: str, num_bytes: int, config: WeightsConfig
    ) -> None:
        self._receiver = receiver
        self._upload_id = upload_id
        self._limit_s = config.bucket_timeout_s
        self._bucket = np.empty(min(config.piece_bytes, num_bytes), np.uint8)
        self._num_filled = 0
        self._num_sent = 0
        self._on_its_way: Any = None

    def write(self, data: memoryview) -> None:
        """Take the next bytes."""
        while data:
            room = len(self._bucket) - self._num_filled
            part, data = data[:room], data[room:]
            end = self._num_filled + len(part)
            self._bucket[self._num_filled : end] = np.frombuffer(part, np.uint8)
            self._num_filled = end
            if end == len(self._bucket):
                self._send()

    def flush(self) -> None:
        """Send the rest, and wait until all has arrived."""
        if self._num_filled:
            self._send()
        self._wait()

    def _send(self) -> None:
        self._wait()
        try:
            bucket = ray.put(self._bucket[: self._num_filled])  # a copy
        except RayError as exc:
            raise WeightTransferError(
                f"a bucket of {self._num_filled} bytes does not get into Ray's object store (see "
                f"weights.bucket_mib): {exc}"
            ) from exc
        self._on_its_way = self._receiver.append.remote(self._upload_id, self._num_sent, bucket)
        self._num_sent += self._num_filled
        self._num_filled = 0

    def _wait(self) -> None:
        reference, self._on_its_way = self._on_its_way, None
        if reference is not None:
            what = (
                f"take bytes up to {self._num_sent} within weights.bucket_timeout_s "
                f"{self._limit_s:g}"
            )
            get_answer(reference, self._limit_s, what)


def find_receiver(name: str | None, config: WeightsConfig) -> Any:
    """
    Args:
        name: as ``GET /v1/weights`` has it.

    Raises:
        WeightTransferError: this process is on no cluster, or on another than the receiver.
    """
    transport = config.transport.value
    # Unconnected, Ray would start a cluster of its own on the first call.
    if not ray.is_initialized():
        raise WeightTransferError(
            f"weights.transport {transport} needs a trainer on the server's Ray cluster "
            "(ray.address)",
            param="weights.transport",
        )
    if name is None:
        raise WeightTransferError(
            f"weights.transport is {transport} here, but the server was started with another one",
            param="weights.transport",
        )
    namespace, _, actor = name.rpartition("/")
    try:
        return ray.get_actor(actor, namespace=namespace)
    except (ValueError, RayError) as exc:
        raise WeightTransferError(
            f"the server's receiver {name} is not on this Ray cluster: trainer and server need "
            f"the same ray.address ({exc})",
            param="ray.address",
        ) from exc


def get_answer(reference: Any, limit_s: float, what: str) -> Any:
    """An answer of the receiver.

    Raises:
        WeightTransferError: it is gone, says no, or does not answer in time.
    """
    try:
        return ray.get(reference, timeout=limit_s)
    except GetTimeoutError as exc:
        raise WeightTransferError(f"the server's receiver did not {what}") from exc
    except RayTaskError as exc:
        if isinstance(exc.cause, SlipstreamError):
            raise exc.cause from exc
        raise WeightTransferError(f"the server's receiver did not {what}: {exc}") from exc
    except RayError as exc:
        raise WeightTransferError(f"the server's receiver did not {what}: {exc}") from exc
