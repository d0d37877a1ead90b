"""The client commands against a fake server: what they send, print and exit with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.cli.main import app
from shared.errors import RequestError, UnavailableError
from tests.fakes.http_api import HttpApi, running_api

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with running_api() as server:
        yield server


def invoke(*arguments: str) -> str:
    """Output of a command that must succeed; its own errors are raised."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a process, with its real exit code."""
    return subprocess.run(
        [sys.executable, "-m", "shared.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )


def test_engines_are_listed_as_a_table(api: HttpApi) -> None:
    output = invoke("engines", "list", "--url", api.url)
    assert "engine-0" in output
    assert "25%" in output


def test_engines_are_listed_as_json(api: HttpApi) -> None:
    answer = json.loads(invoke("engines", "list", "--url", api.url, "--json"))
    assert answer["engines"][0]["target_version"] == 3


def test_the_server_may_be_named_by_the_environment(
    api: HttpApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_URL", api.url)
    invoke("weights", "show")
    assert api.requests == [("GET", "/v1/weights", None)]


def test_weights_show_where_the_latest_push_stands(api: HttpApi) -> None:
    assert "version 4, loading" in invoke("weights", "show", "--url", api.url)


def test_an_audit_that_finds_other_weights_fails_and_names_them(api: HttpApi) -> None:
    assert "40" in invoke("weights", "audit", "--url", api.url)
    assert api.requests == [("POST", "/v1/weights/audit", {})]
    api.damaged = ["model.norm.weight"]
    result = run_command("weights", "audit", "--url", api.url)
    assert result.returncode == 1
    assert "model.norm.weight" in result.stdout + result.stderr
    answer = run_command("weights", "audit", "--url", api.url, "--json")
    assert (answer.returncode, json.loads(answer.stdout)["is_intact"]) == (1, False)


def test_scaling_waits_until_the_new_engine_serves(api: HttpApi) -> None:
    api.starting_polls = 2
    invoke("engines", "scale", "2", "--wait", "30", "--url", api.url)
    assert api.requests[0] == ("PUT", "/v1/engines", {"count": 2})
    assert len(api.requests) == 3


def test_scaling_that_does_not_settle_says_what_it_waited_for(api: HttpApi) -> None:
    api.starting_polls = 1000
    with pytest.raises(UnavailableError, match=r"0\.1 s.*2 serving engines.*engine-1 starting"):
        invoke("engines", "scale", "2", "--wait", "0.1", "--url", api.url)


def test_the_message_of_a_refusal_reaches_the_user(api: HttpApi) -> None:
    error = {"code": "invalid_request", "type": "RequestError", "message": "count 99 is above 4"}
    api.refusal = (400, error)
    with pytest.raises(RequestError, match="count 99 is above 4"):
        invoke("engines", "scale", "99", "--url", api.url)


def test_an_answer_of_another_version_is_an_error_not_a_traceback(api: HttpApi) -> None:
    api.policy["surprise"] = 1
    result = run_command("speculation", "show", "--url", api.url)
    assert result.returncode == 1
    assert "not what this version expects" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unreachable_server_exits_with_1_and_says_how_to_name_it() -> None:
    result = run_command("engines", "list", "--url", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "--url" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["config", "show", "--set", "model.path=m", "--set", "engine.count=-1"],
        ["serve", "--config", "absent.yaml"],
        ["train", "--set", "model.path=m"],
        ["bench", "no-such-benchmark"],
        ["engines", "scale", "many"],
        ["no-such-command"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_wrong_command_line_or_configuration_exits_with_2(arguments: list[str]) -> None:
    result = run_command(*arguments)
    assert result.returncode == 2
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_config_show_prints_what_loads_back(tmp_path: Path) -> None:
    shown = invoke("config", "show", "--set", "model.path=m", "--set", "engine.count=2")
    path = tmp_path / "shown.yaml"
    path.write_text(shown, encoding="utf-8")
    assert invoke("config", "show", "--config", str(path)) == shown


@pytest.mark.parametrize(
    "command",
    ["serve", "train", "run", "rollout", "engines", "speculation", "weights", "make-model",
     "doctor", "config", "bench", "calibrate"],
)  # fmt: skip
def test_every_command_has_help(command: str) -> None:
    assert "Usage" in invoke(command, "--help")
