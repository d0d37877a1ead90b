"""``slipstream config``: what a configuration resolves to."""

from __future__ import annotations

import typer

from shared.cli.options import ConfigOption, JsonOption, SetOption, resolve_server_config
from shared.cli.output import print_json
from shared.config.loading import dump_run_config

config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)


@config_app.command("show")
def show_config(
    config: ConfigOption = None, set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """File, environment and --set merged, checked and printed with every default."""
    resolved = resolve_server_config(config, set_)
    if as_json:
        print_json(resolved)
    else:
        typer.echo(dump_run_config(resolved), nl=False)


@config_app.callback()
def config_root() -> None:
    """Look at the configuration."""
