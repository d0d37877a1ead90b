"""How far a long command is: a bar on stderr where somebody looks at it, and nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def is_watched() -> bool:
    """Whether stderr is a terminal. Variables that force colours do not make it one."""
    return sys.stderr.isatty()


class ProgressBar:
    """A context manager; every method may be called while nothing is drawn."""

    def __init__(self, what: str, total: int, *, completed: int = 0) -> None:
        """
        Args:
            what: is being counted; stands before the bar.
            completed: of ``total``, done before.
        """
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            redirect_stdout=False,  # results go where they are sent, not through the bar
            disable=not is_watched(),
        )
        self._task = self._progress.add_task(what, total=total, completed=completed, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, note: str = "") -> None:
        """One more is done."""
        self._progress.update(self._task, advance=1, note=note)

    def show(self, completed: int, note: str = "") -> None:
        """So many are done."""
        self._progress.update(self._task, completed=completed, note=note)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A sign of life where nothing can be counted."""
    if not is_watched():
        yield
        return
    console = Console(stderr=True)
    with console.status(what):
        yield
