"""Where a trainer writes segments: a file of its own, or the receiver on the server's node."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from shared.config.weights import WeightsConfig
from shared.schemas.weights import WeightManifest
from shared.segment_writer import TensorBuffer, TensorSpec, write_segment
from shared.types import TransportKind
from shared.weights import segment_name
from trainer.rollout_client import RolloutClient

Produce = Callable[[TensorSpec], Iterable[TensorBuffer]]
"""A tensor's bytes in pieces."""


class Outbox(Protocol):
    """One segment at a time."""

    def write(self, version: int, specs: Sequence[TensorSpec], produce: Produce) -> WeightManifest:
        """Put a segment where the server finds it.

        Raises:
            WeightTransferError: it cannot be written; see ``discard``.
        """
        ...

    def discard(self) -> None:
        """Remove the latest segment, or what there is of it: pushed, refused or not complete."""
        ...


class FileOutbox:
    """A file that the server sees under the same path."""

    def __init__(self, directory: Path, *, is_durable: bool) -> None:
        self._directory = directory
        self._is_durable = is_durable
        self._path: Path | None = None

    def write(self, version: int, specs: Sequence[TensorSpec], produce: Produce) -> WeightManifest:
        self._path = self._directory / segment_name(os.getpid(), version)
        # A name left behind by an interrupted push of this very process would refuse the write.
        self._path.unlink(missing_ok=True)
        return write_segment(self._path, specs, produce, is_durable=self._is_durable)

    def discard(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def make_outbox(config: WeightsConfig, client: RolloutClient) -> Outbox:
    """The outbox of the configured transport."""
    if config.transport is TransportKind.RAY:
        # Imported here: who needs no Ray should not wait for it.
        from trainer.ray_transport import RayOutbox

        return RayOutbox(config, client)
    return FileOutbox(config.directory, is_durable=config.transport is TransportKind.FILESYSTEM)
