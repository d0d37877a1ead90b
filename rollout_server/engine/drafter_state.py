"""What is known of an engine's drafter, which may still be following its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class RebuiltDrafter:
    """What came of a drafter's rebuild."""

    version: int
    """Its weights; older than the target's where no rebuild was due."""
    requantize_s: float
    """0.0 where none was due."""


class DrafterState(Protocol):
    """Of an engine whose drafter may still be following its target."""

    @property
    def version(self) -> int:
        """Of the drafter that is whole, or was before the rebuild that is under way."""
        ...

    @property
    def requantize_s(self) -> float | None:
        """Of the last rebuild; None while one is under way."""
        ...

    async def ended(self) -> None:
        """Wait for a rebuild that is under way, whatever comes of it."""
        ...


class CurrentDrafter(RebuiltDrafter):
    """Of an engine whose drafter is never behind."""

    async def ended(self) -> None:
        return
