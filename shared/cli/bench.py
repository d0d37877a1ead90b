"""``slipstream bench``: the benchmarks of this checkout, and ``load`` against a running server."""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.cli.load import load
from shared.cli.options import JsonOption
from shared.cli.output import print_json
from shared.cli.processes import run_module

PACKAGE = "benchmarks"

bench_app = typer.Typer(help="Run a benchmark; its figures go to benchmarks/results/.")
bench_app.command()(load)


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    run_all: Annotated[bool, typer.Option("--all", help="Run every benchmark in turn.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a benchmark; its figures go to benchmarks/results/. Without a name they are listed.

    `load` is about a server that runs already; the others start what they measure.
    """
    if context.invoked_subcommand is not None:
        return
    names = benchmark_names()
    if not run_all:
        print_json(list(names)) if as_json else typer.echo("\n".join(names) or "no benchmarks")
        return
    codes = []
    for number, name in enumerate(names, start=1):
        typer.echo(f"{number} of {len(names)}: {name}", err=True)
        codes.append(run_module(f"{PACKAGE}.{name}", []))
    raise typer.Exit(max(codes, default=0))


def benchmark_names() -> list[str]:
    """Modules of ``benchmarks/`` that can be started."""
    # The console script does not put the project root on the path; `python -m` in it does.
    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(PACKAGE)
    finally:
        sys.path.pop(0)
    if spec is None or spec.submodule_search_locations is None:
        return []
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(
        module.name for module in modules if not module.ispkg and not module.name.startswith("_")
    )


def _add_command(module: str, name: str, *, hidden: bool) -> None:
    @bench_app.command(
        name,
        hidden=hidden,
        help=f"Run {PACKAGE}/{module}.py; arguments go to it.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )
    def run(context: typer.Context) -> None:
        raise typer.Exit(run_module(f"{PACKAGE}.{module}", context.args))


for _module in benchmark_names():
    # As make targets are spelt, and as the module is.
    _add_command(_module, _module.replace("_", "-"), hidden=False)
    if "_" in _module:
        _add_command(_module, _module, hidden=True)
