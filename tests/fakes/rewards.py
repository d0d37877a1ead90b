"""User rewards, well-behaved and not. Run in scoring workers, so nothing heavy is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Metadata = dict[str, Any]


def length(
    prompt: str, completion: str, answer: str | None, metadata: Metadata, factor: float = 1.0
) -> tuple[float, Metadata]:
    detail = {"prompt": prompt, "answer": answer, "metadata": metadata}
    return factor * len(completion), detail


def raises(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    raise RuntimeError("on purpose")


def hangs(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    while True:
        pass


def waits(prompt: str, completion: str, answer: str | None, metadata: Metadata, path: str) -> float:
    """Tell the worker's pid, then do not return."""
    write_whole(path, os.getpid())
    time.sleep(600)
    return 0.0


def waits_with_child(
    prompt: str, completion: str, answer: str | None, metadata: Metadata, path: str
) -> float:
    """Tell the pid of a process it has started, then do not return."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    write_whole(path, child.pid)
    time.sleep(600)
    return 0.0


def exits(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    os._exit(7)


def segfaults(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0.0


def prints(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    """1 when standard input is empty and standard output can be written to."""
    print("x" * 100_000)
    sys.stdout.flush()
    return float(sys.stdin.read() == "")


def pid(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> int:
    return os.getpid()


def order(prompt: str, completion: str, answer: str | None, metadata: Metadata, path: str) -> float:
    with open(path, "a") as file:
        file.write(completion + " ")
    return 0.0


def write_whole(path: str, number: int) -> None:
    """Make a file that is complete as soon as it is there."""
    partial = Path(path + ".partial")
    partial.write_text(str(number))
    partial.rename(path)


USER_REWARDS = {
    function.__name__: f"{__name__}:{function.__name__}"
    for function in (
        length, raises, hangs, waits, waits_with_child, exits, segfaults, prints, pid, order
    )
}  # fmt: skip
"""``scoring.rewards`` with all of the above."""
