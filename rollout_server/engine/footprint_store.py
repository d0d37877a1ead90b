"""Footprints of running engines on disk, for the start after a server was killed.

A killed server cannot clean up after its engines. They end by themselves, but what they had in
shared memory stays; the next start of the same run removes it, and any process that is still there.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from rollout_server.engine.footprint import Footprint, remove_footprint

logger = logging.getLogger(__name__)


class FootprintStore:
    """One small file per engine, in a directory of the run's own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def remember(self, engine_id: str, footprint: Footprint) -> None:
        """Never raises: without the file nothing is wrong until the server is killed."""
        path = self._path(engine_id)
        partial = path.with_suffix(".partial")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(asdict(footprint)), encoding="utf-8")
            os.replace(partial, path)
        except OSError as exc:
            logger.warning("footprint of engine %s not written: %s", engine_id, exc.strerror)

    def forget(self, engine_id: str) -> None:
        """The engine's traces were removed."""
        try:
            self._path(engine_id).unlink(missing_ok=True)
        except OSError as exc:
            logger.warning("footprint of engine %s not removed: %s", engine_id, exc.strerror)

    def clean_up(self) -> int:
        """Remove what engines of a server that is gone have left; how many there were. Blocks."""
        found = sorted(self._directory.glob("*.json"))
        for path in found:
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
                footprint = Footprint(
                    processes=tuple((int(pid), float(time)) for pid, time in fields["processes"]),
                    shared_memory_files=tuple(fields["shared_memory_files"]),
                    place=str(fields.get("place", "")),
                )
            except (OSError, ValueError, KeyError, TypeError) as exc:
                logger.warning("footprint %s cannot be read: %r", path, exc)
            else:
                logger.info("cleaning up after engine %s of a server that is gone", path.stem)
                remove_footprint(footprint)
            path.unlink(missing_ok=True)
        return len(found)

    def _path(self, engine_id: str) -> Path:
        return self._directory / f"{engine_id}.json"
