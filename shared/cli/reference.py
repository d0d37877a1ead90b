"""``python -m shared.cli.reference`` writes ``docs/cli.md``: every command with its options."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from shared.cli.completion import PROGRAM
from shared.cli.main import app

PAGE = Path("docs/cli.md")

HEAD = """\
# Commands

Written by `python -m shared.cli.reference` from the commands themselves; `make docs` does it too.
`slipstream COMMAND --help` says the same.

Results go to stdout: a table for people, and with `--json` one JSON document. Progress and problems
go to stderr, bars only on a terminal. Exit codes:

| Code | Means |
|---|---|
| 0 | done |
| 1 | tried and failed; one line on stderr says why |
| 2 | the command line or the configuration is wrong; nothing was started |
| 130 | interrupted |

`--url` can be left out where `SLIPSTREAM_URL` is set. Keys and certificates come from files or the
environment, never from the command line ([security.md](security.md)). `--set` takes any key of
[configuration.md](configuration.md).

    source <(slipstream completion bash)      # in ~/.bashrc; with zsh in ~/.zshrc
    slipstream completion fish > ~/.config/fish/completions/slipstream.fish
"""

# Typer's commands and parameters are of its private copy of click: seen as Any.
Command = Any


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(name, command) for name, command in commands())


def commands() -> Iterator[tuple[str, Command]]:
    """Every command that does something, by its name with the program's."""
    yield from _below(PROGRAM, typer.main.get_command(app))


def _below(name: str, command: Command) -> Iterator[tuple[str, Command]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for child_name, child in children.items():
        if not child.hidden:  # a second name of another
            yield from _below(f"{name} {child_name}", child)


def _section(name: str, command: Command) -> str:
    lines = [f"\n## `{name}`\n", f"{' '.join(command.help.split())}\n"]
    # Every command has --help.
    params = [param for param in command.params if "--help" not in param.opts]
    if params:
        lines += ["| Argument or option | |", "|---|---|", *map(_row, params)]
    return "\n".join(lines) + "\n"


def _row(param: Any) -> str:
    is_argument = param.param_type_name == "argument"
    names = [param.name.upper()] if is_argument else [*param.opts, *param.secondary_opts]
    value = "" if is_argument else _value(param)
    # The short form last, as in --help.
    shown = ", ".join(f"`{name}`" for name in sorted(names, key=len, reverse=True))
    meaning = " ".join((param.help or "").split()) + _default(param)
    # A bar would end the cell.
    return f"| {shown}{value} | {meaning.replace('|', 'or')} |"


def _value(param: Any) -> str:
    if param.is_flag:
        return ""
    if param.type_descriptor.choices:
        return " " + " or ".join(f"`{_text(choice)}`" for choice in param.type_descriptor.choices)
    kind = re.sub(r"list\[(.+)\]|tuple\[(.+), (.+)\]", _elements, str(param.bare_type()))
    return f" {param.metavar or kind.replace('str', 'text').upper()}"


def _elements(match: re.Match[str]) -> str:
    return " ".join(filter(None, match.groups()))


def _default(param: Any) -> str:
    if param.required:
        return " Required."
    default = param.default
    if default is None or default is False or default == () or callable(default):
        return ""
    if isinstance(default, Sequence) and not isinstance(default, str):
        return f" Default: `{' '.join(map(_text, default))}`."
    return f" Default: `{_text(default)}`."


def _text(value: object) -> str:
    return str(getattr(value, "value", value))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} written", file=sys.stderr)
