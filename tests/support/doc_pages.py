"""Reads pages of the documentation: sections and the code in them; runs that code."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

_HEADING = re.compile(r"^#{2,3} (.+)$", re.MULTILINE)
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ROUTE = re.compile(r"`([A-Z]+) (/\S*)`")
BASE_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What stands under one heading, up to the next one."""

    title: str
    text: str

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and code."""
        return _FENCE.findall(self.text)

    @property
    def route(self) -> tuple[str, str] | None:
        """Method and path, where the heading is a route."""
        match = _ROUTE.fullmatch(self.title)
        return None if match is None else (match[1], match[2])


def sections(page: str) -> list[Section]:
    """In order; what stands before the first heading is left out."""
    _, *parts = _HEADING.split(page)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [Section(title=title, text=text) for title, text in pairs]


def run_python(code: str, url: str) -> str:
    """Run a snippet against the server at ``url``; what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        compiled = compile(code.replace(BASE_URL, url), "<snippet>", "exec")
        exec(compiled, {"__name__": "__main__"})
    return output.getvalue()


def run_shell(code: str, url: str, directory: Path, *, may_fail: bool = False) -> str:
    """Run a snippet with a curl that fails on errors; what it prints."""
    (directory / ".curlrc").write_text("fail-with-body\n")
    run = subprocess.run(
        ["bash", "-c", code.replace(BASE_URL, url)],
        cwd=directory,
        env={**os.environ, "CURL_HOME": str(directory), "SLIPSTREAM_URL": url},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert may_fail == (run.returncode != 0), run.stdout + run.stderr
    return run.stdout


def difference(shown: JsonValue, real: JsonValue, path: str = "$") -> str | None:
    """Where the shape of ``shown`` is not that of ``real``; of lists, the first entries count."""
    if isinstance(shown, dict) and isinstance(real, dict):
        if shown.keys() != real.keys():
            return f"{path}: {sorted(shown.keys() ^ real.keys())} on one side only"
        found = (difference(shown[key], real[key], f"{path}.{key}") for key in shown)
        return next(filter(None, found), None)
    if isinstance(shown, list) and isinstance(real, list):
        if bool(shown) != bool(real):
            return f"{path}: an empty list on one side only"
        return difference(shown[0], real[0], f"{path}[0]") if shown else None
    kinds = [float if type(value) is int else type(value) for value in (shown, real)]
    # What may be null is null in one of them as often as not.
    if type(None) not in kinds and kinds[0] is not kinds[1]:
        return f"{path}: {shown!r} is not like {real!r}"
    return None
