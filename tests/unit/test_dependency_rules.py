"""Who may import what: the rules of docs/architecture.md, checked on the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shared", "rollout_server", "trainer", "benchmarks")
MAX_LINES = 300
FORBIDDEN_IN_SHARED = {"torch", "ray", "vllm", "fastapi", "rollout_server", "trainer", "benchmarks"}
TORCH_FILE_IN_SHARED = "shared/collective_group.py"
"""Both ends of a broadcast, trainer and server, have to be the same code."""
VLLM_FOLDERS = tuple(
    f"rollout_server/{name}/" for name in ("engine", "drafter", "speculation", "weights")
)
RAY_FILES = {
    "launch.py",
    "pool.py",
    "cluster.py",
    "handle.py",
    "actor_calls.py",
    "ray_transport.py",
    "collective_transport.py",
}


def source_files(*packages: str) -> list[str]:
    """Paths below the root, as strings with forward slashes."""
    return sorted(
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    )


def imported_roots(tree: ast.Module) -> Iterator[str]:
    """First name of every import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def imported_modules(tree: ast.Module) -> set[str]:
    """Full names of what is imported, wherever in the file it stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(path: str, source: str) -> list[str]:
    """Every rule the file at ``path`` (relative to the root) breaks."""
    tree = ast.parse(source)
    imports = set(imported_roots(tree))
    package = path.partition("/")[0]
    found = []
    if package == "shared":
        allowed = {"torch"} if path == TORCH_FILE_IN_SHARED else set()
        forbidden = imports & FORBIDDEN_IN_SHARED - allowed
        found += [f"shared imports {name}" for name in sorted(forbidden)]
        if path != TORCH_FILE_IN_SHARED and "shared.collective_group" in imported_modules(tree):
            found.append("shared.collective_group, which imports torch, is imported in shared")
    if package == "rollout_server" and "trainer" in imports:
        found.append("rollout_server imports trainer")
    if package == "trainer" and "rollout_server" in imports:
        found.append("trainer imports rollout_server")
    if package in ("rollout_server", "trainer") and "benchmarks" in imports:
        found.append(f"{package} imports benchmarks")
    if package != "benchmarks" and "vllm" in imports:
        first_line = (ast.get_docstring(tree) or "").partition("\n")[0]
        if not path.startswith(VLLM_FOLDERS):
            found.append(f"vllm is imported outside {', '.join(VLLM_FOLDERS)}")
        elif "vLLM" not in first_line:
            found.append("vllm is imported, but the first line of the docstring does not say vLLM")
    if package != "benchmarks" and "ray" in imports and Path(path).name not in RAY_FILES:
        found.append(f"ray is imported in a file not named {', '.join(sorted(RAY_FILES))}")
    if "fastapi" in imports and not path.startswith("rollout_server/api/"):
        found.append("fastapi is imported outside rollout_server/api/")
    num_lines = len(source.splitlines())
    if num_lines > MAX_LINES:
        found.append(f"{num_lines} lines, more than {MAX_LINES}: split it by responsibility")
    return found


@pytest.mark.parametrize("path", source_files(*PACKAGES))
def test_the_file_keeps_the_dependency_rules(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", source_files("tests"))
def test_test_files_keep_the_length_limit(path: str) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("shared/a.py", "import torch.nn"),
        ("shared/a.py", "from shared.collective_group import Meeting"),
        ("shared/collective_group.py", "import torch\nimport trainer"),
        ("shared/a.py", "def f():\n    from rollout_server.engine import pool"),
        ("rollout_server/router/a.py", "import trainer.loss"),
        ("rollout_server/router/a.py", '"""vLLM."""\nimport vllm'),
        ("rollout_server/engine/a.py", '"""The actor."""\nfrom vllm import LLM'),
        ("rollout_server/engine/actor.py", "import ray"),
        ("rollout_server/router/a.py", "from fastapi import FastAPI"),
        ("trainer/a.py", "from rollout_server import metrics"),
        ("trainer/a.py", "x = 1\n" * (MAX_LINES + 1)),
    ],
)
def test_each_rule_can_fail(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


def test_allowed_imports_are_not_reported() -> None:
    assert violations("rollout_server/engine/a.py", '"""Around vLLM."""\nimport vllm') == []
    assert violations("rollout_server/engine/pool.py", "import ray") == []
    assert violations("rollout_server/api/app.py", "import fastapi") == []
