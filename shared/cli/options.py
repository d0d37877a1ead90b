"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shared.config.loading import load_run_config
from shared.config.model_support import check_configured_model
from shared.config.run import RunConfig
from shared.errors import ConfigurationError

DEFAULT_URL = "http://127.0.0.1:8000"

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML configuration file; presets are in deploy/configs/."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting, such as engine.count=2. Repeatable.",
    ),
]
UrlOption = Annotated[
    str, typer.Option("--url", envvar="SLIPSTREAM_URL", help="Base URL of the rollout server.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Longest wait for an answer.")
]


def resolve_config(config: Path | None, overrides: list[str] | None) -> RunConfig:
    """File, environment and ``--set``, merged and validated.

    Raises:
        ConfigurationError: nothing was given, or what was given is wrong.
    """
    if config is None and not overrides:
        raise ConfigurationError(
            "no configuration: give --config FILE (presets are in deploy/configs/) "
            "or --set model.path=DIRECTORY",
            param="model.path",
        )
    return load_run_config(config, overrides or ())


def resolve_serving_config(config: Path | None, overrides: list[str] | None) -> RunConfig:
    """The same, for commands whose engines will hold the model: it has to be one they can serve.

    Raises:
        ConfigurationError: also when the model cannot be served or cannot draft.
    """
    resolved = resolve_config(config, overrides)
    check_configured_model(resolved)
    return resolved
