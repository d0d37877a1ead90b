"""Commands that start processes: ``serve``, ``train``, ``run``, ``make-model``, ``calibrate``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from shared.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    resolve_config,
    resolve_server_config,
    resolve_serving_config,
)
from shared.cli.output import stderr_console
from shared.cli.processes import run_module
from shared.cli.run_directory import claim_run_directory, write_config
from shared.cli.supervisor import RunFailedError, Supervisor
from shared.config.metric_sinks import check_metric_sinks
from shared.config.trainer import ArithmeticTaskConfig
from shared.errors import ConfigurationError

TASK_DEFAULTS = ArithmeticTaskConfig()

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint of the run of this name.")
]


def serve(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the weights that this name had committed.")
    ] = False,
) -> None:
    """Start the rollout server in the foreground."""
    claimed = claim_run_directory(resolve_server_config(config, set_), resume=resume)
    path = write_config(claimed, claimed.run_dir / "config.yaml")
    raise typer.Exit(run_module("rollout_server", ["--config", str(path)]))


def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    url: Annotated[
        str | None,
        typer.Option("--url", envvar="SLIPSTREAM_URL", help="Server; else trainer.server_url."),
    ] = None,
) -> None:
    """Start only the trainer, against a running server."""
    resolved = resolve_config(config, set_)
    check_metric_sinks(resolved.trainer)
    if url is not None:
        server = resolved.trainer.model_copy(update={"server_url": url})
        resolved = resolved.model_copy(update={"trainer": server})
    if resolved.trainer.server_url is None:
        raise ConfigurationError(
            "no rollout server: give --url, SLIPSTREAM_URL or trainer.server_url "
            "(`slipstream run` starts server and trainer together)",
            param="trainer.server_url",
        )
    claimed = claim_run_directory(resolved, resume=resume)
    path = write_config(claimed, claimed.run_dir / "config.yaml")
    arguments = ["--config", str(path), *(["--resume"] if resume else [])]
    raise typer.Exit(run_module("trainer", arguments))


def run(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a whole job: model if needed, server, trainer, live view, report, summary."""
    console = stderr_console()
    try:
        resolved = resolve_server_config(config, set_)
        check_metric_sinks(resolved.trainer)
        # A program reads the summary alone; what is for people moves out of its way.
        with Supervisor(resolved, resume=resume, talks_on_stderr=as_json) as supervisor:
            console.print(f"run directory: {supervisor.run_dir}", highlight=False)
            supervisor.make_model()
            with console.status("starting engines"):
                address = supervisor.start_server()
            console.print(f"server ready: {address.url}", highlight=False)
            supervisor.train(address)
            supervisor.stop_all()
            supervisor.build_report()
            summary = supervisor.run_dir / "summary.json"
    except KeyboardInterrupt:
        console.print("stopped; `--resume` goes on from the last checkpoint")
        raise typer.Exit(130) from None
    except RunFailedError as exc:
        typer.echo(f"error: {exc.message}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(summary.read_text(encoding="utf-8"))


def make_model(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create.")],
    preset: Annotated[str, typer.Option(help="Which model.")] = "tiny-arithmetic",
    warm_start_steps: Annotated[
        int, typer.Option(min=0, help="Supervised steps before it is written.")
    ] = 400,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    num_terms: Annotated[
        tuple[int, int], typer.Option(help="Fewest and most terms of a problem.")
    ] = TASK_DEFAULTS.num_terms,
    max_operand: Annotated[
        int, typer.Option(min=2, help="Largest operand of a problem.")
    ] = TASK_DEFAULTS.max_operand,
    as_json: JsonOption = False,
) -> None:
    """Create a small model for the CPU demonstration."""
    arguments = [
        *("--output", str(output), "--preset", preset),
        *("--warm-start-steps", str(warm_start_steps), "--seed", str(seed)),
        *("--num-terms", *map(str, num_terms), "--max-operand", str(max_operand)),
        *(["--json"] if as_json else []),
    ]
    raise typer.Exit(run_module("trainer.demo_model", arguments))


def calibrate(
    config: ConfigOption = None,
    set_: SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Else deploy/calibration."),
    ] = None,
) -> None:
    """Measure this device's step times for the scheduler: one engine, a few minutes, one file."""
    resolved = resolve_serving_config(config, set_)
    with tempfile.TemporaryDirectory(prefix="slipstream-calibrate-") as directory:
        path = write_config(resolved, Path(directory) / "config.yaml")
        arguments = ["--config", str(path)]
        if output is not None:
            arguments += ["--output", str(output)]
        code = run_module("rollout_server.calibrate", arguments)
    raise typer.Exit(code)
