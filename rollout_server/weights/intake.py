"""From a pushed segment to a verified file of the server's own. Blocks; the server runs it in a
thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rollout_server.weights.delta import apply_delta
from rollout_server.weights.snapshot import (
    CommittedSnapshot,
    adopt_segment,
    claim_segment,
    remove_segment,
)
from rollout_server.weights.verify import verify_segment
from shared.config.weights import WeightsConfig
from shared.errors import InvalidRequestError
from shared.schemas.weights import PublishRequest
from shared.types import SegmentEncoding, TransportKind
from shared.weights import SegmentKind, segment_name


def take_in(
    request: PublishRequest,
    previous: CommittedSnapshot | None,
    config: WeightsConfig,
    record_path: Path,
    is_given_up: Callable[[], bool] = lambda: False,
) -> CommittedSnapshot:
    """Make a push's file the server's own, and verify it. Nothing is left of one that is refused.

    Args:
        previous: what is committed: the base of a delta.
        record_path: of the record that will refer to the file.
        is_given_up: asked now and then; True ends the work.

    Raises:
        InvalidRequestError: a delta, but the committed version is no push it could build on.
        WeightVerificationError: the bytes are not what the manifest says.
        WeightTransferError: the file cannot be adopted, or no room.
    """
    manifest, directory = request.manifest, config.directory
    path = directory / segment_name(os.getpid(), request.version, SegmentKind.SERVER)
    try:
        if manifest.encoding is SegmentEncoding.FULL:
            # Adopted before it is verified: what engines load is then the file that was checked.
            adopt_segment(directory, manifest.segment, path, record_path)
            verify_segment(path, manifest, is_given_up)
        else:
            if previous is None:
                raise InvalidRequestError(
                    "a delta needs a pushed version as its base, and version 0 is the model "
                    "directory: push every tensor (manifest.encoding full)",
                    param="manifest.encoding",
                )
            is_durable = config.transport is TransportKind.FILESYSTEM
            delta_path = directory / manifest.segment
            apply_delta(previous, delta_path, manifest, path, is_given_up, is_durable=is_durable)
            claim_segment(path, record_path)
    except BaseException:  # whatever it is, nothing of a refused push stays
        remove_segment(path)
        raise
    manifest = manifest.model_copy(update={"encoding": SegmentEncoding.FULL})
    return CommittedSnapshot(version=request.version, path=str(path), manifest=manifest)
