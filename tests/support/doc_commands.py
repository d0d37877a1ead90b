"""Commands in the documentation: found, and held against the real command line and Makefile."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.cli.completion import PROGRAM
from shared.cli.reference import commands
from shared.config.loading import load_run_config
from shared.config.settings_list import setting_keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]

_STARTS = re.compile(r"(?:[A-Z_]+=\S+ )*(slipstream|make|python -m) ")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:slipstream|make|python -m) [^`]+)`")
_INSIDE = re.compile(r"<\((slipstream [^)]*)\)")
_TARGET = re.compile(r"^([a-z%-]+):", re.MULTILINE)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMANDS = dict(commands())


def whole_commands(text: str) -> Iterator[str]:
    """Lines of shell blocks, indented or fenced, that start one of our commands."""
    plain = _FENCE.sub("", text)
    blocks = [code for language, code in _FENCE.findall(text) if language in ("bash", "")]
    blocks += [line[4:] for line in plain.splitlines() if line.startswith("    ")]
    for line in "\n".join(blocks).splitlines():
        yield from _INSIDE.findall(line)
        if _STARTS.match(line):
            yield line


def named_commands(text: str) -> Iterator[str]:
    """Code in running text that names a command, perhaps without all it needs."""
    for found in _INLINE.findall(_FENCE.sub("", text)):
        yield " ".join(found.split())


def check_command(line: str, *, is_whole: bool) -> None:
    """
    Raises:
        ValueError, or what the command line raises: there is no such command, option, module,
            target, setting or file.
    """
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    # `slipstream completion fish > file` and `... | source` are the shell's business from there.
    for end in (">", "|"):
        words = words[: words.index(end)] if end in words else words
    if words[0] == PROGRAM:
        check_slipstream(words[1:], is_whole=is_whole)
    elif words[0] == "make":
        check_make(words[1:])
    elif importlib.util.find_spec(words[2]) is None:
        raise ValueError(f"no module {words[2]}")


def check_slipstream(arguments: Sequence[str], *, is_whole: bool) -> None:
    """Parse what is whole; of what is not, look for the command and the options."""
    if arguments and arguments[0].isupper():
        return  # a placeholder
    names = [name.split()[1:] for name in COMMANDS]
    depth = max((len(name) for name in names if name == list(arguments[: len(name)])), default=0)
    if depth == 0:
        groups = {name[0] for name in names if len(name) > 1}
        if not is_whole and len(arguments) == 1 and arguments[0] in groups:
            return
        raise ValueError(f"no command {' '.join(arguments)}")
    command = COMMANDS[" ".join([PROGRAM, *arguments[:depth]])]
    rest = list(arguments[depth:])
    if not is_whole:
        options = {option for param in command.params for option in param.opts}
        unknown = [word for word in rest if word.startswith("-") and word not in options]
        if unknown:
            raise ValueError(f"{' '.join(arguments)} has no option {unknown}")
        return
    context = command.make_context(arguments[depth - 1], rest)
    check_configuration(context.params)


def check_configuration(params: dict[str, Any]) -> None:
    """A file of ours loads with the overrides; without one, these are settings."""
    if "config" not in params:
        return  # `speculation replay --set` takes fields of the policy
    overrides, path = params["set_"] or (), params["config"]
    if path is not None and path.parts[0] == "deploy":
        load_run_config(ROOT / path, overrides, environment={})
        return
    for item in overrides:
        key = item.partition("=")[0]
        if not any(f"{key}.".startswith(f"{known}.") for known in setting_keys()):
            raise ValueError(f"no setting {key}")


def check_make(words: Sequence[str]) -> None:
    """The target is there, and reads the variables."""
    targets = set(_TARGET.findall(MAKEFILE))
    for word in words:
        name, is_variable, value = word.partition("=")
        if is_variable:
            if f"$({name})" not in MAKEFILE:
                raise ValueError(f"no variable {name} in the Makefile")
            if name == "ARGS" and words[0] == "run":
                preset = "deploy/configs/demo.yaml"
                check_slipstream(["run", "-c", preset, *shlex.split(value)], is_whole=True)
        elif name not in targets and not is_benchmark(name):
            raise ValueError(f"no target {name} in the Makefile")


def is_benchmark(target: str) -> bool:
    """A target of the pattern ``bench-%`` that has its module."""
    prefix, _, name = target.partition("-")
    module = ROOT / "benchmarks" / f"{name.replace('-', '_')}.py"
    return prefix == "bench" and module.exists()
