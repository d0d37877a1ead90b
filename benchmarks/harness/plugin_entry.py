"""Makes vLLM find our plugin when the package is on the path but not installed."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "vllm.general_plugins"
NAME = "slipstream"
TARGET = "rollout_server.engine.vllm_plugin:register"
METADATA = "Metadata-Version: 2.1\nName: slipstream-checkout\nVersion: 0\n"
ROOT = Path(__file__).resolve().parents[2]


def ensure_plugin_entry_point() -> None:
    """Put a distribution that names the plugin on this process's path and its children's.

    vLLM finds plugins by the metadata of installed distributions. Does nothing when the package is
    installed.
    """
    if any(point.name == NAME for point in entry_points(group=GROUP)):
        return
    directory = Path(tempfile.mkdtemp(prefix="slipstream-plugin-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    distribution = directory / "slipstream_checkout-0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(METADATA, encoding="utf-8")
    (distribution / "entry_points.txt").write_text(
        f"[{GROUP}]\n{NAME} = {TARGET}\n", encoding="utf-8"
    )
    paths = [str(directory), str(ROOT)]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([inherited] if inherited else [])])
    importlib.invalidate_caches()
