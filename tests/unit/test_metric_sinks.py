"""TensorBoard, Weights & Biases and trackio, as fake modules; failures that stay in the log."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from shared.cli.doctor_checks import CheckStatus
from shared.cli.doctor_config import check_sinks
from shared.cli.main import app
from shared.config.loading import dump_run_config, load_run_config
from shared.config.metric_sinks import PACKAGES, check_metric_sinks, is_installed
from shared.config.run import RunConfig
from shared.config.trainer import TrainerConfig
from shared.errors import ConfigurationError
from shared.types import MetricSinkKind
from trainer.__main__ import main
from trainer.metric_sinks import SINK_TRANSITIONS, GuardedSink, MetricSinks, SinkState, open_sinks

RECORD = {"step": 3, "time_s": 9.0, "reward/mean": 0.5, "loss/policy": None, "x": float("nan")}


def config_of(tmp_path: Path, *kinds: str) -> RunConfig:
    overrides = ["model.path=m", "name=job", f"output_dir={tmp_path}"]
    return load_run_config(None, [*overrides, f"trainer.metric_sinks=[{', '.join(kinds)}]"], {})


class Calls:
    """A module or object that notes what is called on it."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Calls:
            self.made.append((name, args, kwargs))
            if self.error is not None:
                raise self.error
            return self

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.made]


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", calls)
    return calls


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "wandb", calls)
    return calls


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "trackio", calls)
    return calls


def test_tensorboard_gets_a_scalar_per_value_that_is_a_number(
    tensorboard: Calls, tmp_path: Path
) -> None:
    with open_sinks(config_of(tmp_path, "tensorboard"), completed_steps=0) as sinks:
        sinks.write(RECORD)
    directory = str(tmp_path / "job" / "tensorboard")
    assert tensorboard.made == [
        ("SummaryWriter", (), {"log_dir": directory, "purge_step": None}),
        ("add_scalar", ("reward/mean", 0.5, 3), {}),
        ("flush", (), {}),
        ("close", (), {}),
    ]


def test_a_resumed_run_takes_the_steps_back_that_it_does_again(
    tensorboard: Calls, tmp_path: Path
) -> None:
    open_sinks(config_of(tmp_path, "tensorboard"), completed_steps=10, is_resumed=True)
    assert tensorboard.made[0][2]["purge_step"] == 11


def test_a_run_that_is_resumed_before_its_first_checkpoint_takes_every_step_back(
    tensorboard: Calls, tmp_path: Path
) -> None:
    open_sinks(config_of(tmp_path, "tensorboard"), completed_steps=0, is_resumed=True)
    assert tensorboard.made[0][2]["purge_step"] == 0


def test_weights_and_biases_gets_one_record_per_step(wandb: Calls, tmp_path: Path) -> None:
    config = config_of(tmp_path, "wandb")
    with open_sinks(config, completed_steps=0) as sinks:
        sinks.write(RECORD)
    assert wandb.names == ["init", "log", "finish"]
    options = wandb.made[0][2]
    assert (options["project"], options["name"], options["group"]) == ("slipstream", "job", "job")
    assert options["config"]["trainer"]["metric_sinks"] == ["wandb"]
    assert wandb.made[1] == ("log", ({"reward/mean": 0.5},), {"step": 3})


def test_trackio_goes_on_with_the_run_of_the_same_name(trackio: Calls, tmp_path: Path) -> None:
    with open_sinks(config_of(tmp_path, "trackio"), completed_steps=0) as sinks:
        sinks.write(RECORD)
    assert trackio.names == ["init", "log", "finish"]
    options = trackio.made[0][2]
    assert (options["name"], options["resume"]) == ("job", "allow")
    assert trackio.made[1] == ("log", ({"reward/mean": 0.5},), {"step": 3})


def test_a_sink_that_fails_in_mid_run_is_logged_once_and_the_others_go_on(
    wandb: Calls, trackio: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_sinks(config_of(tmp_path, "wandb", "trackio"), completed_steps=0) as sinks:
        wandb.error = ConnectionError("network is down")
        sinks.write(RECORD)
        sinks.write({**RECORD, "step": 4})
    assert wandb.names == ["init", "log"]
    assert trackio.names == ["init", "log", "log", "finish"]
    (record,) = caplog.records
    assert "wandb failed" in record.message
    assert "network is down" in record.message


def test_a_sink_that_fails_at_its_end_does_no_harm(
    wandb: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_sinks(config_of(tmp_path, "wandb"), completed_steps=0):
        wandb.error = TimeoutError("no upload")
    assert "no upload" in caplog.text


def test_a_sink_that_does_not_end_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    is_up = threading.Event()
    hanging = SimpleNamespace(write=lambda step, values: None, close=lambda: is_up.wait(20))
    with MetricSinks([GuardedSink("x", hanging)], close_timeout_s=0.01):
        pass
    assert "not closed within 0.01 s" in caplog.text
    is_up.set()


def test_a_sink_that_does_not_start_names_setting_and_reason_and_closes_the_others(
    tensorboard: Calls, wandb: Calls, tmp_path: Path
) -> None:
    wandb.error = RuntimeError("not logged in")
    with pytest.raises(ConfigurationError, match=r"trainer\.metric_sinks: wandb .*not logged in"):
        open_sinks(config_of(tmp_path, "tensorboard", "wandb"), completed_steps=0)
    assert tensorboard.names == ["SummaryWriter", "close"]


def test_states_only_go_where_the_table_says() -> None:
    sink = GuardedSink("x", SimpleNamespace(write=lambda step, values: None, close=lambda: None))
    MetricSinks([sink]).write(RECORD)
    assert sink.state is SinkState.OPEN
    sink.close()
    sink.close()
    assert sink.state is SinkState.CLOSED
    assert set(SINK_TRANSITIONS) == set(SinkState)


def test_what_is_not_installed_fails_with_the_name_that_pip_wants() -> None:
    config = TrainerConfig(metric_sinks=(MetricSinkKind.TENSORBOARD, MetricSinkKind.TRACKIO))
    with pytest.raises(ConfigurationError, match="pip install tensorboard trackio") as caught:
        check_metric_sinks(config, lambda package: False)
    assert caught.value.param == "trainer.metric_sinks"
    with pytest.raises(ConfigurationError, match="pip install trackio,"):
        check_metric_sinks(config, lambda package: package != "trackio")
    check_metric_sinks(config, lambda package: True)
    check_metric_sinks(TrainerConfig(), lambda package: False)


def test_every_kind_has_its_package() -> None:
    assert set(PACKAGES) == set(MetricSinkKind)
    assert is_installed("pydantic")
    assert not is_installed("no_such_package_of_anybody")


def test_the_commands_say_so_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = [kind for kind, package in PACKAGES.items() if not is_installed(package)]
    if not absent:
        pytest.skip("every metric sink is installed here")
    config = config_of(tmp_path, *absent)
    path = tmp_path / "config.yaml"
    path.write_text(dump_run_config(config))
    assert main(["--config", str(path)]) == 2
    assert "pip install" in capsys.readouterr().err
    for command in ("train", "run"):
        result = CliRunner().invoke(app, [command, "--config", str(path)])
        assert isinstance(result.exception, ConfigurationError), command
        assert "pip install" in result.exception.message
    assert not (tmp_path / "job").exists()
    assert check_sinks(config).status is CheckStatus.FAILED


def test_a_kind_counts_once_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "trackio", "trackio")
    assert config.trainer.metric_sinks == (MetricSinkKind.TRACKIO,)
    with pytest.raises(ConfigurationError, match=r"trainer\.metric_sinks\.0.*mlflow"):
        config_of(tmp_path, "mlflow")
