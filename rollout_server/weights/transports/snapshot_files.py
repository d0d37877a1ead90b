"""Where an engine finds the file of a snapshot: what the coordinator knows of transports."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rollout_server.engine.protocol import EngineHandle
from rollout_server.weights.snapshot import (
    CommittedSnapshot,
    remove_segment,
    remove_spares,
    retire_segment,
)


class SnapshotFiles(Protocol):
    """The server's own files, and their copies where engines are on other machines."""

    @property
    def receiver(self) -> str | None:
        """The actor that takes segments from trainers, for those that send them."""
        ...

    def node_receivers(self, engines: Sequence[EngineHandle]) -> list[str]:
        """Those on the other nodes of these engines, for trainers that broadcast."""
        ...

    async def welcome(self, engine: EngineHandle) -> None:
        """Have on an engine's node what trainers may broadcast to. Never raises: without it, what
        is pushed comes from the server."""
        ...

    async def bring(self, snapshot: CommittedSnapshot, engines: Sequence[EngineHandle]) -> bool:
        """Have a verified snapshot where all of these engines are; whether anything travelled.

        What fails for one machine is kept for ``path_for`` and does not strand the others.

        Raises:
            WeightTransferError: the server's own file cannot be read.
        """
        ...

    def path_for(self, engine: EngineHandle, path: str) -> str:
        """The path under which this engine opens the server's file ``path``.

        Raises:
            EngineDeadError: its machine is lost.
            EngineError: the file could not be brought there.
        """
        ...

    async def remove(self, path: str) -> None:
        """Remove a file of the server and its copies. Never raises: leftovers are swept later."""
        ...

    async def retire(self, snapshot: CommittedSnapshot) -> None:
        """Remove a superseded snapshot's file and its copies, or leave the file's memory for the
        next version. Never raises."""
        ...

    async def close(self) -> None:
        """Remove what is on other machines, and what ``retire`` left; the server's own files stay.
        May be called again."""
        ...


class SharedFiles:
    """Every engine sees the server's own directory: one host, or a shared disk.

    Args:
        spares: where superseded files are left for the next version: shared memory. None: nowhere.
    """

    receiver: str | None = None

    def __init__(self, spares: Path | None = None) -> None:
        self._spares = spares

    def node_receivers(self, engines: Sequence[EngineHandle]) -> list[str]:
        return []

    async def welcome(self, engine: EngineHandle) -> None:
        """It sees what the server sees."""

    async def bring(self, snapshot: CommittedSnapshot, engines: Sequence[EngineHandle]) -> bool:
        return False

    def path_for(self, engine: EngineHandle, path: str) -> str:
        return path

    async def remove(self, path: str) -> None:
        await asyncio.to_thread(remove_segment, path)

    async def retire(self, snapshot: CommittedSnapshot) -> None:
        # One from before a restart may lie in the state directory.
        if Path(snapshot.path).parent == self._spares:
            await asyncio.to_thread(retire_segment, snapshot.path, snapshot.version)
        else:
            await self.remove(snapshot.path)

    async def close(self) -> None:
        """Nothing is anywhere else."""
        if self._spares is not None:
            await asyncio.to_thread(remove_spares, self._spares)
