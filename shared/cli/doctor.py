"""``slipstream doctor``: is this machine, and this configuration, fit to serve?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shared.cli.doctor_checks import CheckResult, CheckStatus, machine_checks
from shared.cli.doctor_config import configuration_checks
from shared.cli.options import JsonOption, SetOption
from shared.cli.output import print_json, stdout_console
from shared.config.loading import load_run_config
from shared.errors import ConfigurationError

MARKS = {
    CheckStatus.OK: "[green]ok     [/]",
    CheckStatus.WARNING: "[yellow]warning[/]",
    CheckStatus.FAILED: "[red]failed [/]",
}


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Check this configuration as well.")
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check versions, memory, leftovers and settings; exit code 1 when something must be fixed."""
    results = machine_checks()
    if config is not None or set_:
        results += check_configuration(config, set_)
    if as_json:
        print_json([{**asdict(result), "status": result.status.value} for result in results])
    else:
        console = stdout_console()
        for result in results:
            console.print(f"{MARKS[result.status]} {result.name}: {result.detail}", highlight=False)
    if any(result.status is CheckStatus.FAILED for result in results):
        raise typer.Exit(1)


def check_configuration(config: Path | None, overrides: list[str] | None) -> list[CheckResult]:
    """Whether it loads, and whether it is wise."""
    try:
        resolved = load_run_config(config, overrides or ())
    except ConfigurationError as exc:
        failed = CheckStatus.FAILED
        return [CheckResult(name="configuration", status=failed, detail=exc.message)]
    return configuration_checks(resolved)
