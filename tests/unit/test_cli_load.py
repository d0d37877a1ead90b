"""``slipstream bench``: its list, ``load`` against a server, what is passed on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.harness.modelled_engine import EngineTimes
from benchmarks.harness.modelled_server import ModelledServer
from shared.cli.bench import bench_app, benchmark_names
from shared.cli.load import LoadFigures
from shared.cli.main import app
from shared.errors import RequestError, UnavailableError
from shared.schemas.rollouts import RolloutUsage

USAGE = RolloutUsage(
    num_prompt_tokens=3, num_completion_tokens=20, num_draft_tokens=0, num_accepted_tokens=0
)


@pytest.fixture(scope="module")
def server() -> Iterator[ModelledServer]:
    limits = {"max_pending_samples": 8}
    with ModelledServer(settings={"server": {"limits": limits}}) as running:
        yield running


def run_load(*arguments: str) -> object:
    result = CliRunner().invoke(app, ["bench", "load", "--json", *arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def test_figures_are_rates_and_quantiles_of_what_was_answered() -> None:
    figures = LoadFigures(elapsed_s=10.0)
    for milliseconds in range(1, 101):
        figures.note(USAGE, 4, milliseconds / 1000)
    report = figures.report()
    assert report["requests_per_s"] == 10.0
    assert report["samples_per_s"] == 40.0
    assert report["completion_tokens_per_s"] == 200.0
    assert (report["latency_s_p50"], report["latency_s_p90"]) == (0.051, 0.091)


def test_load_keeps_as_many_requests_under_way_as_asked_for(server: ModelledServer) -> None:
    report = run_load(
        "--url", server.url, "--duration", "0.5", "--concurrency", "2", "--max-tokens", "5"
    )
    assert isinstance(report, dict)
    assert report["requests"] > 2
    assert report["errors"] == {}
    assert report["completion_tokens_per_s"] == pytest.approx(report["samples_per_s"] * 5, rel=0.01)


def test_refused_requests_are_counted_by_the_servers_code(server: ModelledServer) -> None:
    report = run_load(
        "--url", server.url, "--duration", "0.2", "--concurrency", "1", "--n", "8",
        "--prompts", str(_two_prompts(server)),
    )  # fmt: skip
    assert isinstance(report, dict)
    assert report["errors"] == {}
    with pytest.raises(RequestError, match="9 samples"):
        run_load("--url", server.url, "--duration", "0.2", "--n", "9")


def _two_prompts(server: ModelledServer) -> Path:
    path = server.log_path.parent / "prompts.jsonl"
    path.write_text('"a"\n{"prompt": "b"}\n', encoding="utf-8")
    return path


def test_overload_is_a_figure_with_the_servers_code() -> None:
    limits = {"max_pending_samples": 4}
    with ModelledServer(
        settings={"server": {"limits": limits}}, times=EngineTimes(step_s=0.01)
    ) as busy:
        report = run_load("--url", busy.url, "--duration", "0.5", "--concurrency", "3")
    assert isinstance(report, dict)
    assert report["errors"]["overloaded"] > 0
    assert report["requests"] > 0


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="no server answers"):
        run_load("--url", "http://127.0.0.1:9", "--duration", "0.1")


def test_without_a_name_the_benchmarks_are_listed_and_each_is_a_command() -> None:
    listed = json.loads(CliRunner().invoke(app, ["bench", "--json"]).stdout)
    assert listed == benchmark_names()
    assert {"http", "overload", "routing", "weights"} <= set(listed)
    commands = {command.name for command in bench_app.registered_commands}
    assert commands >= {*listed, "weight-transports"}


def test_arguments_after_the_name_go_to_the_benchmark(capfd: pytest.CaptureFixture[str]) -> None:
    assert CliRunner().invoke(app, ["bench", "routing", "--help"]).exit_code == 0
    assert "--seeds" in capfd.readouterr().out
