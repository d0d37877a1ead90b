"""Ends vLLM's processes as soon as they have shut down.

After its shutdown each of them would spend seconds in the interpreter's own finalization, freeing
one by one what the kernel frees at once; vLLM waits five seconds for that and then kills. An engine
that is told to stop is to be gone.

Leans on (vLLM 0.32.0): ``EngineCoreProc.run_engine_core`` calls ``EngineCore.shutdown`` in the end,
while the ``SystemExit`` of a clean stop passes through; ``WorkerProc.worker_main`` calls
``WorkerProc.shutdown`` last of all.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from multiprocessing import util
from pathlib import Path
from typing import Any


def exit_after_clean_stop(shutdown: Any) -> Any:
    """Wrap ``EngineCore.shutdown``: a crash goes its way, with its exit code and traceback."""

    def wrapped(core: Any) -> None:
        shutdown(core)
        exception = sys.exc_info()[1]
        if isinstance(exception, SystemExit) and exception.code in (None, 0):
            _exit_child()

    return wrapped


def exit_after(shutdown: Any) -> Any:
    """Wrap ``WorkerProc.shutdown``: whatever went before has been logged and told the engine."""

    def wrapped(worker: Any) -> None:
        shutdown(worker)
        _exit_child()

    return wrapped


def _exit_child() -> None:
    if multiprocessing.parent_process() is None:
        return  # an engine inside its user's own process
    # What multiprocessing and Intel's OpenMP would do at exit: give back what outlives a process.
    util._exit_function()  # type: ignore[attr-defined]
    Path(f"/dev/shm/__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}").unlink(missing_ok=True)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
