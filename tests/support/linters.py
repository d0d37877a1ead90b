"""Linters that packages bring along, where they are installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def linter(*names: str) -> str | None:
    """The first that is on the path or beside this Python."""
    beside = Path(sys.executable).parent
    for name in names:
        found = shutil.which(name) or shutil.which(name, path=str(beside))
        if found is not None:
            return found
    return None
