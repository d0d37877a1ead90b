"""Hands a new version of the policy to the server: a shared-memory file and one HTTP call."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from shared.errors import SlipstreamError, WeightTransferError
from shared.schemas.weights import PublishRequest, PublishResponse
from shared.weights import (
    TensorSource,
    build_manifest,
    segment_name,
    sweep_stale_segments,
    write_safetensors,
)
from trainer.policy import Policy
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)

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

    def __init__(self, client: RolloutClient, directory: str | Path) -> None:
        self._client = client
        self._directory = Path(directory)
        for name in sweep_stale_segments(self._directory):
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
        path = self._directory / segment_name(os.getpid(), version)
        # A name left behind by an interrupted push of this very process would refuse the write.
        path.unlink(missing_ok=True)
        try:
            num_bytes = write_safetensors(path, _sources(policy))
            request = PublishRequest(
                version=version, base_version=base_version, manifest=build_manifest(path)
            )
            response = self._send(request)
        finally:
            path.unlink(missing_ok=True)
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
            num_bytes=num_bytes,
            push_s=monotonic() - started_s,
            paused_s=paused_s,
        )

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


def _sources(policy: Policy) -> Iterator[TensorSource]:
    for name, tensor in policy.served_tensors():
        # numpy has no bfloat16; only the bytes matter, so every tensor goes as bytes.
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        yield name, _SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), raw
