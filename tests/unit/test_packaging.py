"""The package's extras and the lock say the same thing."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    """Versions of one file of ``deploy/constraints``."""
    locked = dict(
        line.partition("==")[::2]
        for line in (ROOT / f"deploy/constraints/{name}.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    return {
        canonicalize_name(name): version.split(";")[0].strip() for name, version in locked.items()
    }


def check(requirements: list[str], pinned: dict[str, str]) -> None:
    for text in requirements:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (text, version)


def test_the_cpu_extra_is_satisfied_by_the_lock() -> None:
    """``pip install .[cpu]`` and ``make setup`` must not disagree."""
    locked = {**pins("cpu"), "torch": "2.13.0"}  # torch: installed first, by deploy/install.sh
    check([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"]], locked)


def test_the_math_extra_is_satisfied_by_its_pins_which_are_in_no_other_file() -> None:
    check(PROJECT["optional-dependencies"]["math"], pins("math"))
    others = [pins(name) for name in ("cpu", "cuda", "dev", "cluster")]
    assert not any(pins("math").keys() & other.keys() for other in others)
