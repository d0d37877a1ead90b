"""The processes of engines and of scoring, and what slows them down without killing them."""

from __future__ import annotations

import time

import psutil

HALT_S = 2.0
"""Longer than a status takes, shorter than ``engine.frozen_timeout_s``."""
SLOW_S = 8.0
SLOW_SLICE_S = 0.2


def core_of(actor: psutil.Process) -> psutil.Process:
    """The process that computes.

    Raises:
        AssertionError: the engine has none.
    """
    children = actor.children(recursive=True)
    cores = [child for child in children if "EngineCore" in child.name()]
    assert cores, f"no engine core, only {[child.name() for child in children]}"
    return cores[0]


def scoring_workers(server_pid: int) -> list[psutil.Process]:
    """Of a server."""
    family = psutil.Process(server_pid).children(recursive=True)
    return [process for process in family if "rollout_server.scoring" in _command(process)]


def halt(process: psutil.Process) -> None:
    """Stop it for a while."""
    process.suspend()
    time.sleep(HALT_S)
    process.resume()


def slow_down(process: psutil.Process) -> None:
    """Stop it for half of the time, for a while."""
    for _ in range(round(SLOW_S / SLOW_SLICE_S / 2)):
        process.suspend()
        time.sleep(SLOW_SLICE_S)
        process.resume()
        time.sleep(SLOW_SLICE_S)


def is_gone(process: psutil.Process) -> bool:
    """It has ended, though perhaps nobody has collected it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
