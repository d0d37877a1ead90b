"""Pieces of the tables that result files become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def head(*cells: str) -> list[str]:
    """First row and the line below it; the first column is text, the others are numbers."""
    return [row(cells), row([":---", *["---:"] * (len(cells) - 1)])]


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(bounds: Iterable[float], digits: int = 3) -> str:
    """``least to most``."""
    return " to ".join(f"{bound:.{digits}f}" for bound in bounds)


def circumstances(document: Mapping[str, Any]) -> str:
    """Where and at which commit, as ``results.write_result`` keeps it."""
    facts = document["circumstances"]
    return (
        f"{facts['num_cores']} cores of {facts['cpu']}, vLLM {facts['vllm']}, "
        f"commit {facts['commit']}."
    )
