"""The package's extras and the lock say the same thing."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def test_the_cpu_extra_is_satisfied_by_the_lock() -> None:
    """``pip install .[cpu]`` and ``make setup`` must not disagree."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    locked = dict(
        line.partition("==")[::2]
        for line in (root / "deploy/constraints/cpu.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    pins = {canonicalize_name(name): version for name, version in locked.items()}
    pins["torch"] = "2.13.0"  # installed first, by deploy/install.sh
    for text in [*project["dependencies"], *project["optional-dependencies"]["cpu"]]:
        requirement = Requirement(text)
        pinned = pins[canonicalize_name(requirement.name)].split(";")[0].strip()
        assert requirement.specifier.contains(pinned), (text, pinned)
