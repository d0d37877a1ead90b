"""Bars are for people at a terminal; results stay clean, and so do logs."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.http_api import HttpApi, running_api

ROOT = Path(__file__).resolve().parents[2]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with running_api() as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n"two"\n"three"\n')
    return path


def run(*arguments: str, on_terminal: bool) -> tuple[str, str]:
    """Stdout, and what a person at stderr would see."""
    # Colours that are forced, as continuous integration does, do not make a terminal.
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "FORCE_COLOR": "1"}
    reader, writer = pty.openpty() if on_terminal else os.pipe()
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(reader, 4096):
                seen.append(data)
        except OSError:
            return  # how a terminal ends

    thread = threading.Thread(target=read)
    thread.start()
    try:
        process = subprocess.run(
            [sys.executable, "-m", "shared.cli", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=writer,
            text=True,
            timeout=60,
        )
    finally:
        os.close(writer)
        thread.join(20)
        os.close(reader)
    errors = b"".join(seen).decode()
    assert process.returncode == 0, errors
    return process.stdout, errors


def test_a_terminal_shows_how_many_prompts_are_done_and_stdout_holds_the_result(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "out.jsonl")
    options = ("rollout", str(prompts), "-o", output, "--url", api.url, "--json")
    result, seen = run(*options, on_terminal=True)
    assert "rollouts" in seen
    assert "3/3" in ESCAPE.sub("", seen)
    assert json.loads(result) == {"output": output, "num_sampled": 3, "num_skipped": 0}


def test_a_pipe_gets_no_bar(api: HttpApi, prompts: Path, tmp_path: Path) -> None:
    options = ("rollout", str(prompts), "-o", str(tmp_path / "out.jsonl"), "--url", api.url)
    assert run(*options, on_terminal=False) == ("", "")
    _, seen = run(*options, on_terminal=False)
    assert seen == f"3 of 3 prompts are in {tmp_path / 'out.jsonl'} already\n"


def test_waiting_for_engines_shows_how_many_serve(api: HttpApi) -> None:
    api.starting_polls = 2
    options = ("engines", "scale", "2", "--wait", "30", "--url", api.url, "--json")
    result, seen = run(*options, on_terminal=True)
    assert "engine-1 starting" in ESCAPE.sub("", seen)
    assert "2/2" in ESCAPE.sub("", seen)
    assert len(json.loads(result)["engines"]) == 2


def test_an_audit_says_what_it_waits_for_on_a_terminal_only(api: HttpApi) -> None:
    options = ("weights", "audit", "--url", api.url, "--json")
    result, seen = run(*options, on_terminal=True)
    assert "comparing the weights" in seen
    assert json.loads(result)["is_intact"] is True
    assert run(*options, on_terminal=False)[1] == ""
