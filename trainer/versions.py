"""Which version a trainer pushes first, and the note of what it announced.

While it runs, a trainer pushes ``committed + 1`` each time. When it starts, it may have crashed
anywhere, and the server may have been started again meanwhile, with or without its memory:

- a server that remembers is asked what is committed: the next version is one more;
- one that has forgotten says less than was certainly committed. The next version is above every
  one this run has announced, since it may have been committed before it was forgotten.

So a version never stands for two contents, and none is skipped while the server remembers. A server
at version 0 counts as one that has forgotten as soon as anything was announced: that costs version
1 if the very first push is broken off before its commit.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigurationError, ConflictError, WeightTransferError
from shared.schemas.weights import WeightsResponse
from shared.segment_writer import sync_directory
from trainer.policy import Policy
from trainer.publish import Publisher
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)

MAX_ROUNDS = 5
"""Of an agreement. Each needs another push that was committed in between."""


class Announced(BaseModel):
    """The push that was announced last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 0
    base_version: int = 0
    """This one was committed when ``version`` was announced."""


class VersionRecord:
    """Remembers over crashes what was announced; one small file, replaced whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Announced:
        """
        Raises:
            ConfigurationError: the file is not one of ours.
        """
        try:
            return Announced.model_validate_json(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Announced()
        except (OSError, ValidationError) as exc:
            raise ConfigurationError(
                f"{self._path} is not readable as the last announced weight version: {exc}"
            ) from exc

    def announce(self, version: int, base_version: int) -> None:
        """To be called before the server hears of ``version``; on return it survives a crash.

        Raises:
            WeightTransferError: the disk does not take it.
        """
        note = Announced(version=version, base_version=base_version)
        partial = self._path.with_name(f".{self._path.name}.partial")
        try:
            with partial.open("wb") as file:
                file.write(note.model_dump_json().encode())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
            sync_directory(self._path.parent)
        except OSError as exc:
            raise WeightTransferError(
                f"version {version} is not pushed: {self._path} cannot be written: {exc.strerror}"
            ) from exc


def version_to_start_with(
    status: WeightsResponse, announced: Announced, checkpointed: int | None
) -> int | None:
    """The version to push the trainer's own weights as; None where both sides have the model
    directory's already.

    Args:
        checkpointed: version of the weights the trainer goes on with; None for a fresh start.
    """
    committed, known = status.committed_version, checkpointed or 0
    last_used = max(committed, status.last_version_used)
    has_forgotten = committed < max(known, announced.base_version) or (
        committed == 0 and announced.version > 0
    )
    if has_forgotten:
        return max(last_used, known, announced.version) + 1
    if checkpointed is None and last_used == 0:
        return None
    return last_used + 1


def agree_on_version(
    client: RolloutClient,
    publisher: Publisher,
    policy: Policy,
    record: VersionRecord,
    checkpointed: int | None,
) -> int:
    """The version that both sides have, after a push of the trainer's own weights where needed.

    A server at version 0 serves ``model.path``, which is what a fresh trainer has. In any other
    case its weights may be anything, and the trainer pushes its own over them.

    Raises:
        SlipstreamError: the server refused the weights, or stayed away.
    """
    status = client.weights()
    for _ in range(MAX_ROUNDS):
        version = version_to_start_with(status, record.read(), checkpointed)
        if version is None:
            return 0
        base_version = status.committed_version
        try:
            publisher.publish(policy, version=version, base_version=base_version)
        except ConflictError as exc:
            # The last push of a trainer that crashed may have been on its way still.
            before, status = status, client.weights()
            if _used(status) == _used(before):
                raise
            LOGGER.warning("version %d was overtaken by another push: %s", version, exc.message)
            continue
        LOGGER.info("pushed own weights as version %d over version %d", version, base_version)
        return version
    raise ConflictError(
        f"another trainer pushes to this server: {MAX_ROUNDS} times its push was first, last to "
        f"version {status.committed_version}"
    )


def _used(status: WeightsResponse) -> tuple[int, int]:
    return status.committed_version, status.last_version_used
