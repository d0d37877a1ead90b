"""``slipstream rollout`` broken off in every way: the same command finishes what is missing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.cli import rollout_results
from shared.cli.main import app
from shared.cli.rollout_results import ResultFile
from shared.errors import ConfigurationError, RequestError, SlipstreamError, UnavailableError
from tests.fakes.http_api import HttpApi, running_api
from tests.fakes.rollouts import rollout_group, rollout_sample

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 6


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with running_api() as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'"prompt {index}"\n' for index in range(NUM_PROMPTS)))
    return path


def arguments(api: HttpApi, prompts: Path, output: Path, *options: str) -> list[str]:
    return ["rollout", str(prompts), "-o", str(output), "--url", api.url, *options]


def sample(api: HttpApi, prompts: Path, output: Path, *options: str) -> None:
    result = CliRunner().invoke(app, arguments(api, prompts, output, *options))
    if result.exception is not None:
        raise result.exception


def ids(output: Path) -> list[str]:
    """Of every line, each of which has to be whole."""
    content = output.read_text(encoding="utf-8")
    assert not content or content.endswith("\n")
    return [json.loads(line)["prompt_id"] for line in content.splitlines()]


def assert_complete(output: Path) -> None:
    assert sorted(int(found.partition("-")[0]) for found in ids(output)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_in_the_middle_goes_on_and_repeats_nothing(
    api: HttpApi, prompts: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    output = tmp_path / "out.jsonl"
    api.hang_stream_after = 4
    process = subprocess.Popen(
        [sys.executable, "-m", "shared.cli", *arguments(api, prompts, output)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (output.exists() and output.read_bytes().count(b"\n") == 4):
        assert process.poll() is None  # bounded by the test's timeout
        time.sleep(0.02)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    kept = ids(output)
    assert len(kept) == 4
    if signum is not signal.SIGKILL:
        assert process.returncode == 130
        assert "2 prompts are left" in errors
        assert "Traceback" not in errors
        deletes = [path for method, path, _ in api.requests if method == "DELETE"]
        assert deletes == [f"/v1/rollouts/{api.requests[0][2]['request_id']}"]
    api.hang_stream_after = None
    api.requests.clear()
    sample(api, prompts, output)
    assert len(api.requests[0][2]["prompts"]) == 2
    assert ids(output)[:4] == kept
    assert_complete(output)


@pytest.mark.parametrize("length", range(1, 40, 3))
def test_a_line_that_a_crash_cut_anywhere_is_removed_and_its_prompt_asked_for_again(
    api: HttpApi, prompts: Path, tmp_path: Path, length: int
) -> None:
    output = tmp_path / "out.jsonl"
    sample(api, prompts, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:5]) + lines[5][:length])
    sample(api, prompts, output)
    assert_complete(output)


@pytest.mark.parametrize("content", ['{"precious": 1}', "words\n", '"prompt 1"\n', "{"])
def test_a_file_of_somebody_else_is_left_as_it_is(
    api: HttpApi, prompts: Path, tmp_path: Path, content: str
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    if content == "{":  # may be the beginning of a line of ours, and nothing is lost with it
        sample(api, prompts, output)
        assert_complete(output)
        return
    with pytest.raises(ConfigurationError, match="line 1 is not a result"):
        sample(api, prompts, output)
    assert output.read_text() == content
    assert api.requests == []


def test_two_at_a_time_do_not_write_one_file(api: HttpApi, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with (
        ResultFile(output),
        pytest.raises(ConfigurationError, match=r"out\.jsonl: another `slipstream rollout`"),
    ):
        sample(api, prompts, output)
    sample(api, prompts, output)
    assert_complete(output)


def test_an_output_that_cannot_be_written_is_said_before_anything_is_sampled(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="No such file or directory"):
        sample(api, prompts, tmp_path / "absent" / "out.jsonl")
    assert api.requests == []


def test_a_full_disk_leaves_whole_lines_and_says_that_the_command_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = rollout_group(samples=[rollout_sample(0, reward=1.0)])
    write = os.write
    written = 0

    def full_after_100(descriptor: int, data: bytes) -> int:
        nonlocal written
        if written >= 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(descriptor, data[:100])
        written += count
        return count

    with ResultFile(tmp_path / "out.jsonl") as results:
        results.add("1-a", group)
        monkeypatch.setattr(rollout_results.os, "write", full_after_100)
        with pytest.raises(SlipstreamError, match=r"No space left.*1 results are in it"):
            results.add("2-b", group)
    assert ids(tmp_path / "out.jsonl") == ["1-a"]


def test_a_request_that_still_runs_is_attached_to_and_gives_each_result_once(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    api.cut_stream_after = 2
    api.kept_state = "running"
    sample(api, prompts, tmp_path / "out.jsonl")
    (first, _, body), (second, _, _), (third, _, same_body) = api.requests
    assert (first, second, third) == ("POST", "GET", "POST")
    assert body == same_body
    assert_complete(tmp_path / "out.jsonl")


def test_a_request_that_finished_meanwhile_is_fetched(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    api.cut_stream_after = 2
    api.kept_state = "finished"
    sample(api, prompts, tmp_path / "out.jsonl")
    assert [method for method, _, _ in api.requests] == ["POST", "GET"]
    assert_complete(tmp_path / "out.jsonl")


def test_samples_that_were_aborted_on_the_server_are_asked_for_again(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    api.num_aborted_streams = 1
    sample(api, prompts, tmp_path / "out.jsonl")
    assert [len(body["prompts"]) for _, _, body in api.requests] == [6, 6]
    assert_complete(tmp_path / "out.jsonl")


def test_prompts_that_are_aborted_every_time_are_given_up(
    api: HttpApi, prompts: Path, tmp_path: Path
) -> None:
    api.num_aborted_streams = 2
    with pytest.raises(UnavailableError, match="6 prompts were aborted"):
        sample(api, prompts, tmp_path / "out.jsonl", "--retries", "1")
    assert ids(tmp_path / "out.jsonl") == []


def test_a_refused_prompt_is_named_by_its_line(api: HttpApi, prompts: Path, tmp_path: Path) -> None:
    prompts.write_text("\n\n" + prompts.read_text())
    error = {"code": "invalid_request", "type": "t", "message": "prompts.1 is too long"}
    api.refusal = (400, error | {"param": "prompts.1.prompt"})
    with pytest.raises(RequestError, match=r"line 4 of the prompts: prompts\.1 is too long"):
        sample(api, prompts, tmp_path / "out.jsonl")
    assert [method for method, _, _ in api.requests] == ["POST"]


def test_separators_that_only_unicode_knows_do_not_end_a_line(api: HttpApi, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"a\u2028b"\n{"prompt": "c\u0085d"}\n', encoding="utf-8")
    sample(api, prompts, tmp_path / "out.jsonl")
    sent = [item["prompt"] for item in api.requests[0][2]["prompts"]]
    assert sent == ["a\u2028b", "c\u0085d"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0"], "--top-p"),
        (["--temperature", "200"], "--temperature"),
        (["--reward-params", "{}"], "needs --reward"),
        (["--reward", "r", "--reward-params", "[]"], "not a JSON object"),
        (["--reward", "r", "--reward-params", "{"], "not JSON"),
    ],
)
def test_a_wrong_option_is_named(
    api: HttpApi, prompts: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        sample(api, prompts, tmp_path / "out.jsonl", *options)


def test_every_sampling_option_travels(api: HttpApi, prompts: Path, tmp_path: Path) -> None:
    options = ["--top-p", "0.5", "--top-k", "7", "--min-p", "0.1", "--stop", "a", "--stop", "b"]
    options += ["--reward", "numeric_answer", "--reward-params", '{"wrong": -1}']
    sample(api, prompts, tmp_path / "out.jsonl", *options)
    body = api.requests[0][2]
    sampling = body["sampling"]
    assert (sampling["top_p"], sampling["top_k"], sampling["min_p"]) == (0.5, 7, 0.1)
    assert sampling["stop"] == ["a", "b"]
    assert body["reward"] == {"name": "numeric_answer", "params": {"wrong": -1}}
