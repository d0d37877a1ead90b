"""Makes an engine's processes start sooner: each of them imports all of vLLM.

An import makes millions of objects that stay, and Python's garbage collector walks over them again
and again, for a third of the time. And a spawned process first imports the main module of the one
that spawned it, which for an engine is Ray's worker, and with it Ray.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
from collections.abc import Iterator

RARE_THRESHOLD = 1_000_000
"""New objects between two collections: some hundred megabytes at most that wait for one."""
MAIN_MODULE = "rollout_server.engine.spawned_main"

_usual: tuple[int, int, int] | None = None


def collect_rarely() -> None:
    """Until ``collect_as_usual``. Still collects: where nobody ever calls that, memory is safe."""
    global _usual
    if _usual is None:
        _usual = gc.get_threshold()
        gc.set_threshold(RARE_THRESHOLD, *_usual[1:])


def collect_as_usual() -> None:
    """As it was before ``collect_rarely``; nothing where that was not called."""
    global _usual
    if _usual is not None:
        gc.set_threshold(*_usual)
        _usual = None


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """While something large is imported."""
    collect_rarely()
    try:
        yield
    finally:
        collect_as_usual()


@contextlib.contextmanager
def spawning_lightly() -> Iterator[None]:
    """Processes that are spawned meanwhile, and their own, begin with ``MAIN_MODULE`` instead of
    this process's main module (Python: ``multiprocessing.spawn.get_preparation_data``)."""
    main = sys.modules["__main__"]
    before = main.__spec__
    main.__spec__ = importlib.util.find_spec(MAIN_MODULE)
    try:
        yield
    finally:
        main.__spec__ = before
