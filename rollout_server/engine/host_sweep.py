"""Removes what dead engines have left on this host, wherever they had it."""

from __future__ import annotations

from rollout_server.engine.footprint_record import sweep_dead_engines
from rollout_server.engine.scratch import sweep_dead_scratch


def sweep_host() -> None:
    """Blocks for some seconds where engines are just ending: call it in a thread."""
    sweep_dead_engines()
    sweep_dead_scratch()
