"""Hands a new version of the policy to the server: a file both can see, and one HTTP call."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

import torch

from shared.config.weights import WeightsConfig
from shared.errors import SlipstreamError, WeightTransferError
from shared.schemas.weights import PublishRequest, PublishResponse, WeightManifest
from shared.segment_writer import TensorBuffer, TensorSpec
from shared.weights import sweep_stale_segments
from trainer.outbox import make_outbox
from trainer.policy import Policy
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)

PIECE_BYTES = 1 << 25
"""Of a tensor, rounded to the served dtype and in memory at a time."""

_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PushReport:
    """One push as the trainer saw it, in seconds."""

    version: int
    num_bytes: int
    push_s: float
    """From the first byte written to the server's answer."""
    paused_s: float
    """Longest time an engine stood still."""


class Publisher:
    """Writes, announces and removes weight segments. Versions only go up."""

    def __init__(self, client: RolloutClient, config: WeightsConfig) -> None:
        self._client = client
        self._config = config
        self._outbox = make_outbox(config, client)
        for name in sweep_stale_segments(config.directory):
            LOGGER.info("removed the weight segment %s of a process that is gone", name)

    def publish(self, policy: Policy, *, version: int, base_version: int) -> PushReport:
        """Push ``policy`` as ``version``, built on ``base_version``.

        Raises:
            WeightTransferError: the version does not go up, or the segment cannot be written.
            SlipstreamError: the server refused or lost the push; the old version still serves.
        """
        if version <= base_version:
            raise WeightTransferError(
                f"version {version} must be above its base version {base_version}"
            )
        started_s = monotonic()
        try:
            manifest = self._write(version, policy)
            request = PublishRequest(
                version=version,
                base_version=base_version,
                transport=self._config.transport,
                manifest=manifest,
            )
            response = self._send(request)
        finally:
            self._outbox.discard()
        paused_s = 0.0
        if response is not None:
            paused_s = max((timings.paused_s for timings in response.engines), default=0.0)
            if response.engines_removed:
                LOGGER.warning(
                    "version %d: engines %s failed inside the commit and were taken out",
                    version,
                    ", ".join(response.engines_removed),
                )
        return PushReport(
            version=version,
            num_bytes=sum(entry.num_bytes for entry in manifest.tensors),
            push_s=monotonic() - started_s,
            paused_s=paused_s,
        )

    def _write(self, version: int, policy: Policy) -> WeightManifest:
        """The policy as a segment, a piece of a tensor in memory at a time."""
        tensors = dict(policy.served_tensors())
        specs = [
            TensorSpec(name, _SAFETENSORS_DTYPES[policy.dtype_served(tensor)], tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]

        def produce(spec: TensorSpec) -> Iterator[TensorBuffer]:
            for piece in policy.served_pieces(tensors[spec.name], PIECE_BYTES):
                # numpy has no bfloat16; only the bytes matter, so every tensor goes as bytes.
                yield piece.view(torch.uint8).numpy()

        return self._outbox.write(version, specs, produce)

    def _send(self, request: PublishRequest) -> PublishResponse | None:
        """The server's answer; None when it got lost but the version is committed all the same."""
        try:
            return self._client.publish(request)
        except SlipstreamError:
            # A repeated push whose first answer was lost is refused as a conflict; only the
            # committed version tells whether it arrived.
            if self._client.weights().committed_version != request.version:
                raise
            LOGGER.warning("version %d was committed, its answer was lost", request.version)
            return None
