"""``slipstream completion``: how a shell completes commands, options and their values."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer
from typer._completion_shared import get_completion_script

from shared.cli.api_client import ApiClient
from shared.credentials import load_credentials
from shared.errors import SlipstreamError
from shared.schemas.engines import EnginesResponse

PROGRAM = "slipstream"
COMPLETE_VARIABLE = "_SLIPSTREAM_COMPLETE"
ENGINES_TIMEOUT_S = 1.0
"""Whoever pressed the key is waiting."""


class Shell(StrEnum):
    """Shells there is a script for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="Whose script.")]) -> None:
    """Print a completion script; `source <(slipstream completion bash)` in ~/.bashrc loads it."""
    typer.echo(
        get_completion_script(prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE, shell=shell.value)
    )


def complete_setting(incomplete: str) -> list[str]:
    """Keys that ``--set`` takes."""
    # Building the list takes longer than the rest of a command's start.
    from shared.config.settings_list import setting_keys

    return [f"{key}=" for key in setting_keys() if key.startswith(incomplete)]


def complete_engine(ctx: typer.Context, incomplete: str) -> list[str]:
    """Engines of the server that the command line or the environment names; none if it is away."""
    try:
        credentials = load_credentials(
            ctx.params.get("api_key_file"), ctx.params.get("ca_file"), os.environ
        )
        with ApiClient(str(ctx.params["url"]), ENGINES_TIMEOUT_S, credentials) as client:
            engines = client.get("/v1/engines", EnginesResponse).engines
    except (SlipstreamError, KeyError):
        return []
    return [engine.engine_id for engine in engines if engine.engine_id.startswith(incomplete)]
