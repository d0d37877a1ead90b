"""Hands a new version of the policy to the server: a file both can see, and one HTTP call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic

import torch

from shared.config.weights import WeightsConfig
from shared.errors import ConflictError, RequestError, WeightTransferError
from shared.schemas.weights import PublishRequest, PublishResponse
from shared.segment_writer import TensorBuffer, TensorSpec
from shared.types import SegmentEncoding
from shared.weights import sweep_stale_segments
from trainer.outbox import Written, make_outbox
from trainer.policy import Policy
from trainer.push_retries import send_push
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)

PIECE_BYTES = 1 << 25
"""Of a tensor, rounded to the served dtype and in memory at a time."""

SEGMENT_PARAM = "manifest.segment"
"""What the server's error names when the file is not there, or is damaged."""

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
    """Of all tensors."""
    sent_bytes: int
    """Of the file: less where only what changed was pushed."""
    push_s: float
    """From the first byte written to the server's answer."""
    paused_s: float
    """Longest time an engine stood still."""


class Publisher:
    """Writes, announces and removes weight segments. Versions only go up."""

    def __init__(
        self,
        client: RolloutClient,
        config: WeightsConfig,
        *,
        announce: Callable[[int, int], None] = lambda version, base_version: None,
        max_retries: int = 0,
    ) -> None:
        """
        Args:
            announce: notes version and base version before the server hears of them
                (``VersionRecord.announce``).
            max_retries: of a push that the server took back (``trainer.push_retries``).
        """
        self._client = client
        self._config = config
        self._announce = announce
        self._max_retries = max_retries
        self._outbox = make_outbox(config, client)
        self._base: tuple[int, str] | None = None
        """The version that is committed, as far as is known, and the server's file of it."""
        for name in sweep_stale_segments(config.directory):
            LOGGER.info("removed the weight segment %s of a process that is gone", name)

    def publish(self, policy: Policy, *, version: int, base_version: int) -> PushReport:
        """Push ``policy`` as ``version``, built on ``base_version``.

        Raises:
            WeightTransferError: the version does not go up, or the segment cannot be written.
            SlipstreamError: see ``push_retries.send_push``.
        """
        if version <= base_version:
            raise WeightTransferError(
                f"version {version} must be above its base version {base_version}"
            )
        started_s = monotonic()
        try:
            written = self._write(policy, version, base_version)
            try:
                response = self._send(written, version, base_version)
            except RequestError as exc:
                if not self._helps_to_write_again(written, exc):
                    raise
                # Nothing is committed under this version: the same tensors may come once more.
                LOGGER.warning("version %d was refused (%s); all of it again", version, exc)
                self._base = None
                self._outbox.discard()
                written = self._write(policy, version, base_version)
                response = self._send(written, version, base_version)
        except BaseException:  # a stop, too
            self._base = None  # what is committed now is not known for sure
            raise
        finally:
            self._outbox.discard()
        self._base = None if response.segment is None else (version, response.segment)
        if response.engines_removed:
            LOGGER.warning(
                "version %d: engines %s failed inside the commit and were taken out",
                version,
                ", ".join(response.engines_removed),
            )
        return PushReport(
            version=version,
            num_bytes=sum(entry.num_bytes for entry in written.manifest.tensors),
            sent_bytes=written.num_bytes,
            push_s=monotonic() - started_s,
            paused_s=max((timings.paused_s for timings in response.engines), default=0.0),
        )

    def _helps_to_write_again(self, written: Written, error: RequestError) -> bool:
        """Whether a refusal is about the file rather than about what is in it."""
        if isinstance(error, ConflictError):
            return False
        # On the server's node, a segment goes with the receiver that wrote it: with a server that
        # was killed, or because nobody pushed it for so long.
        is_gone = self._config.spans_nodes and error.param == SEGMENT_PARAM
        return is_gone or written.manifest.encoding is SegmentEncoding.DELTA

    def _write(self, policy: Policy, version: int, base_version: int) -> Written:
        """The policy as a segment: what changed if that pays, else all of it."""
        tensors = dict(policy.served_tensors())
        specs = [
            TensorSpec(name, _SAFETENSORS_DTYPES[policy.dtype_served(tensor)], tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]

        def produce(spec: TensorSpec) -> Iterator[TensorBuffer]:
            # A piece of a tensor is in memory at a time.
            for piece in policy.served_pieces(tensors[spec.name], PIECE_BYTES):
                # numpy has no bfloat16; only the bytes matter, so every tensor goes as bytes.
                yield piece.view(torch.uint8).numpy()

        known, base = self._base or (None, None)
        return self._outbox.write(
            version, specs, produce, base=base if known == base_version else None
        )

    def _send(self, written: Written, version: int, base_version: int) -> PublishResponse:
        self._announce(version, base_version)
        request = PublishRequest(
            version=version,
            base_version=base_version,
            transport=self._config.transport,
            manifest=written.manifest,
        )
        return send_push(
            self._client,
            request,
            max_retries=self._max_retries,
            answer_timeout_s=self._config.longest_answer_s,
        )
