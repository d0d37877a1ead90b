"""Where a trainer writes segments: a file of its own, or the receiver on the server's node."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from shared.config.weights import WeightsConfig
from shared.delta_writer import write_delta
from shared.errors import WeightTransferError
from shared.schemas.weights import WeightManifest
from shared.segment_writer import TensorBuffer, TensorSpec, write_segment
from shared.types import DeltaMode, TransportKind
from shared.weights import segment_name
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)

Produce = Callable[[TensorSpec], Iterable[TensorBuffer]]
"""A tensor's bytes in pieces."""


class Written(NamedTuple):
    """A segment that lies where the server finds it."""

    manifest: WeightManifest
    num_bytes: int
    """Of the file."""


class Outbox(Protocol):
    """One segment at a time."""

    def write(
        self,
        version: int,
        specs: Sequence[TensorSpec],
        produce: Produce,
        *,
        base: str | None = None,
    ) -> Written:
        """Put a segment where the server finds it.

        Args:
            base: the server's file of the version before: where it can be read and little has
                changed, the segment holds only that.

        Raises:
            WeightTransferError: it cannot be written; see ``discard``.
        """
        ...

    def discard(self) -> None:
        """Remove the latest segment, or what there is of it: pushed, refused or not complete."""
        ...


class FileOutbox:
    """A file that the server sees under the same path."""

    def __init__(self, config: WeightsConfig) -> None:
        self._config = config
        self._directory = config.directory
        self._is_durable = config.transport is TransportKind.FILESYSTEM
        self._path: Path | None = None

    def write(
        self,
        version: int,
        specs: Sequence[TensorSpec],
        produce: Produce,
        *,
        base: str | None = None,
    ) -> Written:
        path = self._path = self._directory / segment_name(os.getpid(), version)
        # A name left behind by an interrupted push of this very process would refuse the write.
        path.unlink(missing_ok=True)
        manifest = None
        if base is not None and self._wants_delta:
            manifest = self._write_delta(path, specs, produce, self._directory / base)
        if manifest is None:
            manifest = write_segment(
                path,
                specs,
                produce,
                is_durable=self._is_durable,
                takes_spare=not self._is_durable,
            )
        return Written(manifest, path.stat().st_size)

    @property
    def _wants_delta(self) -> bool:
        mode = self._config.delta
        is_over_disk = self._config.transport is TransportKind.FILESYSTEM
        return mode is DeltaMode.ON or (mode is DeltaMode.AUTO and is_over_disk)

    def _write_delta(
        self, path: Path, specs: Sequence[TensorSpec], produce: Produce, base: Path
    ) -> WeightManifest | None:
        """None where it would not pay, or the base cannot be read."""
        num_bytes = sum(spec.num_bytes or 0 for spec in specs)
        limit_bytes = int(num_bytes * self._config.delta_max_share)
        try:
            return write_delta(
                path,
                specs,
                produce,
                base_path=base,
                limit_bytes=limit_bytes,
                is_durable=self._is_durable,
            )
        except WeightTransferError as exc:
            LOGGER.info("no delta on %s: %s", base.name, exc.message)
            return None

    def discard(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def make_outbox(config: WeightsConfig, client: RolloutClient) -> Outbox:
    """The outbox of the configured transport."""
    if config.transport is TransportKind.RAY:
        # Imported here: who needs no Ray should not wait for it.
        from trainer.ray_transport import RayOutbox

        return RayOutbox(config, client)
    if config.transport is TransportKind.NCCL:
        from trainer.collective_transport import CollectiveOutbox

        return CollectiveOutbox(config, client)
    return FileOutbox(config)
