"""``slipstream speculation``: see when engines draft and why, change it, rerun a recorded trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shared.cli.completion import complete_engine
from shared.cli.options import (
    DEFAULT_URL,
    ApiKeyFileOption,
    CaFileOption,
    JsonOption,
    TimeoutOption,
    UrlOption,
    connect,
)
from shared.cli.output import print_json, print_table
from shared.cli.processes import run_module
from shared.errors import ConfigurationError
from shared.schemas.speculation import (
    EngineSpeculation,
    SpeculationChange,
    SpeculationPolicy,
    SpeculationResponse,
)
from shared.types import SpeculationMode

speculation_app = typer.Typer(help="See and change when engines draft.", no_args_is_help=True)

REPLAY_MODULE = "rollout_server.speculation.replay_command"
COLUMNS = (
    *("engine", "mode", "K now", "reason", "predicted", "acceptance by position"),
    *("cost model", "KV", "steps on", "switches", "acceptance length"),
)


@speculation_app.command("show")
def show_speculation(
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """The policy, and what each engine does because of it."""
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        # The latest decision of each engine tells what was predicted of it.
        answer = client.get("/v1/speculation?history=1", SpeculationResponse)
    print_speculation(answer, as_json)


@speculation_app.command("set")
def set_speculation(
    mode: Annotated[SpeculationMode | None, typer.Option(help="When to draft.")] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(min=1, help="Draft length; the longest that adaptive chooses.")
    ] = None,
    kv_cache_threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draft below this KV occupancy.")
    ] = None,
    kv_cache_threshold_tokens: Annotated[
        int | None, typer.Option(min=1, help="The same in tokens, instead of the fraction.")
    ] = None,
    kv_cache_hysteresis: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Reopen this far below the threshold.")
    ] = None,
    min_dwell_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps the gate stays closed at least.")
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(min=1.0, max=10.0, help="Adaptive: predicted gain that starts drafting."),
    ] = None,
    switch_margin: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Adaptive: gain that another draft length needs."),
    ] = None,
    exploration_fraction: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.2, help="Adaptive: share of steps that may be trials."),
    ] = None,
    per_request: Annotated[
        bool | None,
        typer.Option(
            "--per-request/--no-per-request",
            help="Verify fewer drafts of requests that accept badly.",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="ID",
            autocompletion=complete_engine,
            help="Only this engine, until the next change for all. Repeatable.",
        ),
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Change the policy at once and without a restart: of every engine, or of some (--engine)."""
    if kv_cache_threshold is not None and kv_cache_threshold_tokens is not None:
        raise ConfigurationError(
            "--kv-cache-threshold and --kv-cache-threshold-tokens are two thresholds: give one"
        )
    change = SpeculationChange(
        mode=mode,
        num_speculative_tokens=num_speculative_tokens,
        kv_cache_threshold=kv_cache_threshold,
        kv_cache_threshold_tokens=kv_cache_threshold_tokens,
        kv_cache_hysteresis=kv_cache_hysteresis,
        min_dwell_steps=min_dwell_steps,
        min_speedup=min_speedup,
        switch_margin=switch_margin,
        exploration_fraction=exploration_fraction,
        per_request=per_request,
        engine_ids=engine or None,
    )
    if not change.patch.model_dump(exclude_none=True):
        raise ConfigurationError("nothing to change: give at least one option, see --help")
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        answer = client.send("PATCH", "/v1/speculation", change, SpeculationResponse)
    print_speculation(answer, as_json)


@speculation_app.command("replay")
def replay_trace(
    trace: Annotated[Path, typer.Argument(help="An engine's file in speculation.trace_directory.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Decide under this setting. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Decide a recorded run again. Without --set every decision must come out as recorded."""
    arguments = [str(trace)]
    for change in set_ or ():
        arguments += ["--set", change]
    raise typer.Exit(run_module(REPLAY_MODULE, [*arguments, *(["--json"] if as_json else [])]))


def print_speculation(answer: SpeculationResponse, as_json: bool) -> None:
    """Print policy and engines."""
    if as_json:
        print_json(answer)
        return
    title = describe_policy(answer.policy, answer.max_num_speculative_tokens)
    rows = [
        engine_row(report, answer.overrides.get(report.engine_id, answer.policy))
        for report in answer.engines
    ]
    own = [
        f"{engine_id} has settings of its own: "
        f"{describe_policy(policy, answer.max_num_speculative_tokens)}"
        for engine_id, policy in answer.overrides.items()
    ]
    print_table(title, COLUMNS, rows, "\n".join(own) or None)


def describe_policy(policy: SpeculationPolicy, max_num_speculative_tokens: int) -> str:
    """One line."""
    tokens = policy.kv_cache_threshold_tokens
    threshold = f"{policy.kv_cache_threshold:.0%} KV" if tokens is None else f"{tokens} KV tokens"
    return (
        f"mode {policy.mode}, {policy.num_speculative_tokens} of at most "
        f"{max_num_speculative_tokens} tokens, below {threshold} "
        f"(hysteresis {policy.kv_cache_hysteresis:.0%}, dwell {policy.min_dwell_steps} steps)"
    )


def engine_row(report: EngineSpeculation, policy: SpeculationPolicy) -> list[object]:
    """What ``COLUMNS`` say."""
    speedup = report.history[-1].predicted_speedup if report.history else None
    return [
        report.engine_id,
        policy.mode,
        report.num_speculative_tokens,
        report.reason,
        None if speedup is None else f"{speedup:.2f}x",
        " ".join(f"{share:.2f}" for share in report.acceptance_per_pos) or None,
        report.cost_model or None,
        f"{report.kv_cache_usage:.0%}",
        f"{report.num_steps_on}/{report.num_steps}",
        report.num_switches,
        report.mean_acceptance_length,
    ]
