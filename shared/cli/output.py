"""What commands print: tables for people, JSON for programs, messages on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

import typer
from pydantic import BaseModel, JsonValue
from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or another program."""


def stdout_console() -> Console:
    """Console for results. Made per call, so that a redirected stdout is honoured."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def stderr_console() -> Console:
    """Console for progress and problems."""
    return Console(stderr=True)


def print_json(value: BaseModel | JsonValue) -> None:
    """One JSON document on stdout."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str | None = None
) -> None:
    """A table on stdout; numbers are set flush right."""
    cells = [list(row) for row in rows]
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[index], int | float) for row in cells)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        # The first column is the id: it must stay whole to be used in the next command.
        table.add_column(column, justify=justify, overflow="fold", no_wrap=index == 0)
    for row in cells:
        table.add_row(*(format_cell(cell) for cell in row))
    stdout_console().print(table)


def format_cell(value: object) -> str:
    """Short text of one value: three significant decimals, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)
