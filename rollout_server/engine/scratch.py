"""A directory of an engine's own for what vLLM puts among everybody's temporary files.

vLLM's processes talk over sockets in ``VLLM_RPC_BASE_PATH`` and find each other by a file in the
temporary directory (``vllm.utils.network_utils``, 0.32.0). A killed engine leaves both behind, with
nothing in their names that says whose they were; in a directory with the engine's name in it, they
can be removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rollout_server.engine.footprint import is_own
from shared.process_identity import boot_id, pid_namespace, process_lives, process_start_ticks

LOGGER = logging.getLogger(__name__)

NAME_PREFIX = "slipstream."
"""Short, for the sake of sockets."""
NAME = re.compile(
    r"slipstream\.(?P<pid>[0-9]+)\.(?P<start>[0-9]+)\.(?P<namespace>[0-9]+)"
    r"\.(?P<boot>\w+)\.\w+"
)
MAX_SOCKET_PATH = 107
"""Linux: ``sockaddr_un.sun_path``, less the zero at its end."""
SOCKET_NAME_LENGTH = 37
"""A slash and a UUID."""


class ScratchDirectory:
    """Of one engine of the calling process. Made when it is entered.

    Args:
        parent: the temporary directory; ``/tmp`` where sockets in it would have too long a path.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = Path(tempfile.gettempdir()) if parent is None else parent
        self._path: Path | None = None

    @contextlib.contextmanager
    def of_child_processes(self) -> Iterator[None]:
        """Where vLLM, and every process started meanwhile, puts its temporary files.

        PyTorch's compiled kernels stay where all engines find them.
        """
        pid = os.getpid()
        owner = f"{pid}.{process_start_ticks(pid) or 0}.{pid_namespace()}.{boot_id()}"
        path = self._make(self._parent, owner)
        if len(str(path)) + SOCKET_NAME_LENGTH > MAX_SOCKET_PATH:
            path.rmdir()
            path = self._make(Path("/tmp"), owner)
        self._path = path
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        variables = {
            "TMPDIR": str(path),
            "VLLM_RPC_BASE_PATH": str(path),
            "TORCHINDUCTOR_CACHE_DIR": cache_dir(),
        }
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def remove(self) -> None:
        """The engine has shut down."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._path = None

    @staticmethod
    def _make(parent: Path, owner: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{NAME_PREFIX}{owner}.", dir=parent))


def sweep_dead_scratch(parent: Path | None = None) -> list[str]:
    """Remove those of this user's engines, of this host and pid namespace, that are dead; names."""
    parents = {Path(tempfile.gettempdir()), Path("/tmp")} if parent is None else {parent}
    removed = []
    for path in sorted(path for one in parents for path in one.glob(f"{NAME_PREFIX}*")):
        name = NAME.fullmatch(path.name)
        if name is None or not is_own(path, stat.S_ISDIR):
            continue
        # Hosts may share the directory, and containers: their pids say nothing here.
        if (int(name["namespace"]), name["boot"]) != (pid_namespace(), boot_id()):
            continue
        if process_lives(int(name["pid"]), int(name["start"])):
            continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path.name)
    if removed:
        LOGGER.info("removed what dead engines have left: %s", ", ".join(removed))
    return removed
