"""``slipstream completion``: the scripts of the shells, and what they are told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.cli.completion import PROGRAM
from shared.cli.main import app
from tests.fakes.http_api import running_api

ROOT = Path(__file__).resolve().parents[2]
SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a ``slipstream`` on the path, as an installed one is."""
    program = tmp_path / "slipstream"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m shared.cli "$@"\n')
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if "SLIPSTREAM" not in name}
    return kept | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def run(command: list[str], environment: dict[str, str]) -> str:
    run = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def completed_by(shell: str, line: str, **environment: str) -> set[str]:
    """What the script of a shell is given for a command line that ends where the cursor is."""
    variables = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    told = environment | variables | {"_SLIPSTREAM_COMPLETE": f"complete_{shell}"}
    result = CliRunner().invoke(app, [], prog_name=PROGRAM, env=told)
    assert result.exit_code == 0, result.output
    if shell == "zsh":
        return set(re.findall(r'"(.+?)":', result.stdout))
    return {found.partition("\t")[0] for found in result.stdout.split("\n") if found}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_asks_this_program(shell: str) -> None:
    script = CliRunner().invoke(app, ["completion", shell]).stdout
    assert f"_SLIPSTREAM_COMPLETE=complete_{shell}" in script
    binary = shutil.which(shell)
    if binary is not None:
        check = subprocess.run([binary, "-n"], input=script, text=True, timeout=60)
        assert check.returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_told_commands(shell: str) -> None:
    assert completed_by(shell, "slipstream eng") == {"engines"}
    assert {"list", "scale"} <= completed_by(shell, "slipstream engines ")


def test_bash_completes_with_the_script(environment: dict[str, str]) -> None:
    script = (
        "source <(slipstream completion bash); COMP_WORDS=(slipstream weights au); COMP_CWORD=2; "
        '_slipstream_completion slipstream; echo "${COMPREPLY[@]}"'
    )
    assert run(["bash", "-c", script], environment).split() == ["audit"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("slipstream speculation set --mod", {"--mode"}),
        ("slipstream speculation set --mode ad", {"adaptive"}),
        ("slipstream serve --set drafter.int4_g", {"drafter.int4_group_size="}),
        ("slipstream doctor --set engine.max_c", {"engine.max_count="}),
        ("slipstream bench weight-", {"weight-transports"}),
        ("slipstream completion z", {"zsh"}),
    ],
)
def test_options_and_their_values_are_completed(line: str, expected: set[str]) -> None:
    assert completed_by("bash", line) == expected


def test_engines_are_those_of_the_server() -> None:
    line = "slipstream speculation set --engine e"
    with running_api() as api:
        api.engine_count = 2
        found = completed_by("bash", line, SLIPSTREAM_URL=api.url)
        assert found == {"engine-0", "engine-1"}
    assert completed_by("bash", line, SLIPSTREAM_URL=api.url) == set(), (
        "a server that is away has none"
    )
