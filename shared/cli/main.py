"""Entry point of ``slipstream``: the command tree and the exit codes.

0: done. 1: it was tried and failed. 2: the command line or the configuration is wrong.
130: interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from shared.cli import services
from shared.cli.completion import PROGRAM, completion
from shared.cli.config import config_app
from shared.cli.doctor import doctor
from shared.cli.engines import engines_app, pause, resume
from shared.cli.rollout import rollout
from shared.cli.speculation import speculation_app
from shared.cli.weights import weights_app
from shared.errors import ConfigurationError, SlipstreamError

app = typer.Typer(
    help="Slipstream: rollouts for reinforcement learning, sped up by lossless self-speculation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(services.serve)
app.command()(services.train)
app.command()(services.run)
app.command()(rollout)
app.add_typer(engines_app, name="engines")
app.command()(pause)
app.command()(resume)
app.add_typer(speculation_app, name="speculation")
app.add_typer(weights_app, name="weights")
app.command("make-model")(services.make_model)
app.command()(services.calibrate)
app.command()(services.bench)
app.command()(doctor)
app.add_typer(config_app, name="config")
app.command()(completion)


def print_version(wanted: bool) -> None:
    """Print the installed version and leave."""
    if not wanted:
        return
    try:
        typer.echo(f"slipstream {version('slipstream-rollout')}")
    except PackageNotFoundError:
        typer.echo("slipstream (not installed: run `make setup`)")
    raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; our own errors become one line on stderr and an exit code."""
    try:
        # Also under `python -m shared.cli`: completion goes by this name.
        app(prog_name=PROGRAM)
    except ConfigurationError as exc:
        typer.echo(f"configuration error: {exc.message}", err=True)
        sys.exit(2)
    except SlipstreamError as exc:
        typer.echo(f"error: {exc.message}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # `slipstream ... | head`: point stdout somewhere, or the interpreter complains on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
