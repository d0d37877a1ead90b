"""Options that several commands share, declared once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shared.cli.api_client import ApiClient
from shared.cli.completion import complete_setting
from shared.config.loading import load_run_config
from shared.config.model_support import check_configured_model
from shared.config.run import RunConfig
from shared.config.server_access import check_server_access
from shared.credentials import load_credentials
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
        autocompletion=complete_setting,
    ),
]
ApiKeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="File with the API key, readable by its owner only; else SLIPSTREAM_API_KEY or "
        "SLIPSTREAM_API_KEY_FILE.",
    ),
]
CaFileOption = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        help="PEM certificates the server's is checked against; else SLIPSTREAM_CA_FILE.",
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


def resolve_server_config(config: Path | None, overrides: list[str] | None) -> RunConfig:
    """The same, for commands that start a server: keys, certificate and address have to be fit.

    Raises:
        ConfigurationError: also when the API could be reached without a key, or not at all.
    """
    resolved = resolve_serving_config(config, overrides)
    check_server_access(resolved.server, os.environ)
    return resolved


def connect(
    url: str, timeout_s: float, api_key_file: Path | None, ca_file: Path | None
) -> ApiClient:
    """A client of the server at ``url``, with the key and the certificates of the options or of
    the environment.

    Raises:
        ConfigurationError: the key or the certificates cannot be used.
    """
    return ApiClient(url, timeout_s, load_credentials(api_key_file, ca_file, os.environ))
