"""``slipstream speculation`` and ``calibrate``: what they send, start and print."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.cli import services, speculation
from shared.cli.main import app
from shared.config.loading import load_run_config
from shared.errors import ConfigurationError
from tests.fakes.http_api import HttpApi, running_api


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with running_api() as server:
        yield server


def invoke(*arguments: str, code: int = 0) -> str:
    """Output of a command that must end with ``code``; its own errors are raised."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_showing_speculation_tells_what_each_engine_does_and_why(api: HttpApi) -> None:
    output = invoke("speculation", "show", "--url", api.url)
    for text in ("kv_gate", "predicted_faster", "1.42x", "0.95 0.90 0.81", "self", "8/10"):
        assert text in output


def test_changing_speculation_sends_only_what_was_given(api: HttpApi) -> None:
    output = invoke(
        *("speculation", "set", "--kv-cache-threshold", "0.3", "--url", api.url, "--json")
    )
    assert api.requests == [("PATCH", "/v1/speculation", {"kv_cache_threshold": 0.3})]
    assert json.loads(output)["policy"]["kv_cache_threshold"] == 0.3


def test_every_field_of_the_policy_can_be_set(api: HttpApi) -> None:
    options = [
        *("--mode", "adaptive", "--num-speculative-tokens", "2", "--kv-cache-threshold-tokens"),
        *("5000", "--kv-cache-hysteresis", "0.01", "--min-dwell-steps", "3", "--min-speedup"),
        *("1.1", "--switch-margin", "0.05", "--exploration-fraction", "0", "--no-per-request"),
    ]
    invoke("speculation", "set", *options, "--url", api.url)
    assert api.requests[0][2] == {
        "mode": "adaptive",
        "num_speculative_tokens": 2,
        "kv_cache_threshold_tokens": 5000,
        "kv_cache_hysteresis": 0.01,
        "min_dwell_steps": 3,
        "min_speedup": 1.1,
        "switch_margin": 0.05,
        "exploration_fraction": 0.0,
        "per_request": False,
    }


def test_a_change_can_be_for_some_engines_only(api: HttpApi) -> None:
    output = invoke("speculation", "set", "--mode", "off", "--engine", "engine-0", "--url", api.url)
    assert api.requests[0][2] == {"mode": "off", "engine_ids": ["engine-0"]}
    assert "engine-0 has settings of its own: mode off" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to change"),
        (["--engine", "engine-0"], "nothing to change"),
        (["--kv-cache-threshold", "0.5", "--kv-cache-threshold-tokens", "9"], "two thresholds"),
    ],
)
def test_a_change_that_cannot_be_meant_is_a_usage_error(
    api: HttpApi, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        invoke("speculation", "set", *options, "--url", api.url)
    assert api.requests == []


def test_replay_hands_trace_and_settings_to_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, Sequence[str]]] = []

    def run_module(module: str, arguments: Sequence[str]) -> int:
        started.append((module, arguments))
        return 1

    monkeypatch.setattr(speculation, "run_module", run_module)
    options = ["--set", "mode=off", "--set", "min_dwell_steps=1", "--json"]
    invoke("speculation", "replay", "e.jsonl", *options, code=1)
    assert started == [("rollout_server.speculation.replay_command", ["e.jsonl", *options])]


def test_calibrate_hands_the_resolved_configuration_to_its_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, object] = {}

    def run_module(module: str, arguments: Sequence[str]) -> int:
        flag, path, *rest = arguments
        seen.update(module=module, flag=flag, rest=rest)
        seen["cores"] = load_run_config(Path(path), environment={}).engine.max_num_seqs
        return 0

    monkeypatch.setattr(services, "run_module", run_module)
    monkeypatch.setattr(services, "resolve_serving_config", services.resolve_config)
    settings = ["--set", "model.path=m", "--set", "engine.max_num_seqs=5"]
    invoke("calibrate", *settings, "--output", str(tmp_path))
    assert seen == {
        "module": "rollout_server.calibrate",
        "flag": "--config",
        "rest": ["--output", str(tmp_path)],
        "cores": 5,
    }
