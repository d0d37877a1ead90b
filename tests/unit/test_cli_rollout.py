"""``slipstream rollout``: nothing is lost, nothing is sampled twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shared.cli.main import app
from shared.errors import ConfigurationError, UnavailableError
from tests.fakes.http_api import HttpApi, running_api


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with running_api() as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        '"one"',
        '{"prompt": "two", "answer": "2"}',
        "",
        '{"messages": [{"role": "user", "content": "three"}]}',
        '{"prompt_token_ids": [5, 6]}',
        '"one"',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def sample(api: HttpApi, prompts: Path, output: Path, *options: str) -> None:
    arguments = ["rollout", str(prompts), "-o", str(output), "--url", api.url, *options]
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None:
        raise result.exception


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def posts(api: HttpApi) -> list[dict[str, Any]]:
    """Bodies of the rollout requests."""
    return [body for _, path, body in api.requests if path == "/v1/rollouts"]


def line_numbers(output: Path) -> list[int]:
    return sorted(int(record["prompt_id"].partition("-")[0]) for record in records(output))


def test_every_prompt_of_the_file_gets_one_result(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    sample(api, prompts, tmp_path / "out.jsonl", "--chunk-size", "2")
    assert line_numbers(tmp_path / "out.jsonl") == [1, 2, 4, 5, 6]
    assert [len(body["prompts"]) for body in posts(api)] == [2, 2, 1]


def test_results_belong_to_their_prompts_though_they_finish_in_another_order(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    sample(api, prompts, tmp_path / "out.jsonl")
    by_line = {r["prompt_id"].partition("-")[0]: r for r in records(tmp_path / "out.jsonl")}
    assert by_line["2"]["answer"] == "2"
    assert by_line["1"]["metadata"]["text"] == "one"


def test_settings_travel_with_the_request(api: HttpApi, prompts: Path, tmp_path: Path) -> None:
    options = ("--n", "3", "--max-tokens", "7", "--temperature", "0.5", "--reward", "exact_match")
    sample(api, prompts, tmp_path / "out.jsonl", *options)
    body = api.requests[0][2]
    assert (body["n"], body["reward"]["name"], body["stream"]) == (3, "exact_match", True)
    assert (body["sampling"]["max_tokens"], body["sampling"]["temperature"]) == (7, 0.5)


def test_a_second_run_sends_only_what_is_missing(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    sample(api, prompts, output)
    kept = output.read_text(encoding="utf-8").splitlines()[:2]
    # A crash may cut the last line anywhere.
    output.write_text("\n".join(kept) + '\n{"prompt_id": "4-', encoding="utf-8")
    api.requests.clear()
    sample(api, prompts, output)
    assert len(api.requests[0][2]["prompts"]) == 3
    assert line_numbers(output) == [1, 2, 4, 5, 6]


def test_nothing_is_sent_when_everything_is_there(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    sample(api, prompts, tmp_path / "out.jsonl")
    api.requests.clear()
    sample(api, prompts, tmp_path / "out.jsonl")
    assert api.requests == []


def test_other_settings_are_other_results(api: HttpApi, prompts: Path, tmp_path: Path) -> None:
    sample(api, prompts, tmp_path / "out.jsonl")
    sample(api, prompts, tmp_path / "out.jsonl", "--temperature", "0.1")
    assert len(records(tmp_path / "out.jsonl")) == 10


def test_after_a_broken_stream_a_server_that_forgot_is_asked_for_what_is_missing(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    api.cut_stream_after = 2
    sample(api, prompts, tmp_path / "out.jsonl")
    assert [len(body["prompts"]) for body in posts(api)] == [5, 3]
    assert line_numbers(tmp_path / "out.jsonl") == [1, 2, 4, 5, 6]


def test_a_server_that_stays_overloaded_is_given_up_after_the_retries(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    api.refusal = (429, {"code": "overloaded", "type": "OverloadedError", "message": "queue full"})
    with pytest.raises(UnavailableError, match="queue full"):
        sample(api, prompts, tmp_path / "out.jsonl", "--retries", "2")
    assert [method for method, _, _ in api.requests] == ["POST", "GET", "GET", "DELETE"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"promt": "x"}', "line 2: promt"),
        ("{}", "exactly one of"),
        ("17", "line 2"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_sent(
    api: HttpApi, tmp_path: Path, line: str, message: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'"fine"\n{line}\n', encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        sample(api, prompts, tmp_path / "out.jsonl")
    assert api.requests == []


def test_a_foreign_output_file_is_not_touched(api: HttpApi, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"precious": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigurationError, match="not a result"):
        sample(api, prompts, output)
    assert output.read_text(encoding="utf-8") == '{"precious": 1}\n'
