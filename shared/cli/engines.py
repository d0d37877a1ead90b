"""``slipstream engines``, ``speculation`` and ``weights``: look at a running server, change it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from shared.cli.api_client import ApiClient
from shared.cli.options import DEFAULT_URL, JsonOption, TimeoutOption, UrlOption
from shared.cli.output import print_json, print_table
from shared.errors import ConfigurationError, UnavailableError
from shared.schemas.engines import EnginesResponse, ScaleRequest
from shared.schemas.speculation import SpeculationPatch, SpeculationResponse
from shared.schemas.weights import WeightsResponse
from shared.types import EngineState, SpeculationMode

engines_app = typer.Typer(help="List and scale the rollout engines.", no_args_is_help=True)
speculation_app = typer.Typer(help="See and change when engines draft.", no_args_is_help=True)
weights_app = typer.Typer(help="See which weights are served.", no_args_is_help=True)

WAIT_POLL_S = 0.5


@engines_app.command("list")
def list_engines(
    url: UrlOption = DEFAULT_URL, timeout_s: TimeoutOption = 10.0, as_json: JsonOption = False
) -> None:
    """Engines with their state, load and weight versions."""
    with ApiClient(url, timeout_s) as client:
        show_engines(client.get("/v1/engines", EnginesResponse), as_json)


@engines_app.command("scale")
def scale_engines(
    count: Annotated[int, typer.Argument(min=0, help="How many engines there shall be.")],
    wait_s: Annotated[
        float, typer.Option("--wait", min=0.0, metavar="SECONDS", help="Wait until they serve.")
    ] = 0.0,
    url: UrlOption = DEFAULT_URL,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Set the number of engines; new ones start, surplus ones finish their work and go."""
    with ApiClient(url, timeout_s) as client:
        answer = client.send("PUT", "/v1/engines", ScaleRequest(count=count), EnginesResponse)
        deadline = time.monotonic() + wait_s
        while wait_s and not has_settled(answer):
            if time.monotonic() > deadline:
                states = ", ".join(f"{e.engine_id} {e.state}" for e in answer.engines) or "none"
                raise UnavailableError(
                    f"waited {wait_s:g} s (--wait) for {count} serving engines; now: {states}"
                )
            time.sleep(WAIT_POLL_S)
            answer = client.get("/v1/engines", EnginesResponse)
        show_engines(answer, as_json)


def has_settled(answer: EnginesResponse) -> bool:
    """Whether exactly the wanted number of engines is there, and each can take work."""
    live = [engine for engine in answer.engines if engine.state is not EngineState.DEAD]
    ready = {EngineState.SERVING, EngineState.PAUSED, EngineState.SYNCING}
    return len(live) == answer.target_count and all(engine.state in ready for engine in live)


def show_engines(answer: EnginesResponse, as_json: bool) -> None:
    """Print the engines."""
    if as_json:
        print_json(answer)
        return
    columns = ["engine", "state", "cores", "target", "drafter", "running", "waiting", "KV", "up s"]
    rows = [
        [
            *(e.engine_id, e.state, e.cpu_cores, e.target_version, e.drafter_version),
            *(e.num_running_reqs, e.num_waiting_reqs),
            *(f"{e.kv_cache_usage:.0%}", round(e.uptime_s)),
        ]
        for e in answer.engines
    ]
    errors = "; ".join(f"{e.engine_id}: {e.error}" for e in answer.engines if e.error)
    print_table(f"engines (target {answer.target_count})", columns, rows, errors or None)


@speculation_app.command("show")
def show_speculation(
    url: UrlOption = DEFAULT_URL, timeout_s: TimeoutOption = 10.0, as_json: JsonOption = False
) -> None:
    """The policy, and what each engine does because of it."""
    with ApiClient(url, timeout_s) as client:
        print_speculation(client.get("/v1/speculation", SpeculationResponse), as_json)


@speculation_app.command("set")
def set_speculation(
    mode: Annotated[SpeculationMode | None, typer.Option(help="When to draft.")] = None,
    num_speculative_tokens: Annotated[int | None, typer.Option(min=1, help="Draft length.")] = None,
    kv_cache_threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draft below this KV occupancy.")
    ] = None,
    kv_cache_hysteresis: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Reopen this far below the threshold.")
    ] = None,
    min_dwell_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps the gate stays closed at least.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Change the policy of every engine, at once and without a restart."""
    patch = SpeculationPatch(
        mode=mode,
        num_speculative_tokens=num_speculative_tokens,
        kv_cache_threshold=kv_cache_threshold,
        kv_cache_hysteresis=kv_cache_hysteresis,
        min_dwell_steps=min_dwell_steps,
    )
    if not patch.model_dump(exclude_none=True):
        raise ConfigurationError("nothing to change: give at least one option, see --help")
    with ApiClient(url, timeout_s) as client:
        answer = client.send("PATCH", "/v1/speculation", patch, SpeculationResponse)
        print_speculation(answer, as_json)


def print_speculation(answer: SpeculationResponse, as_json: bool) -> None:
    """Print policy and engines."""
    if as_json:
        print_json(answer)
        return
    policy = answer.policy
    title = (
        f"mode {policy.mode}, {policy.num_speculative_tokens} of at most "
        f"{answer.max_num_speculative_tokens} tokens, below {policy.kv_cache_threshold:.0%} KV "
        f"(hysteresis {policy.kv_cache_hysteresis:.0%}, dwell {policy.min_dwell_steps} steps)"
    )
    columns = ["engine", "now", "reason", "KV", "steps on", "switches", "acceptance length"]
    rows = [
        [
            *(e.engine_id, e.num_speculative_tokens if e.enabled else "off", e.reason),
            *(f"{e.kv_cache_usage:.0%}", f"{e.num_steps_on}/{e.num_steps}", e.num_switches),
            e.mean_acceptance_length,
        ]
        for e in answer.engines
    ]
    print_table(title, columns, rows)


@weights_app.command("show")
def show_weights(
    url: UrlOption = DEFAULT_URL, timeout_s: TimeoutOption = 10.0, as_json: JsonOption = False
) -> None:
    """The committed version, the engines' versions and the latest pushes."""
    with ApiClient(url, timeout_s) as client:
        answer = client.get("/v1/weights", WeightsResponse)
    if as_json:
        print_json(answer)
        return
    engines = [[e.engine_id, e.target_version, e.drafter_version] for e in answer.engines]
    title = f"committed version {answer.committed_version}"
    print_table(title, ["engine", "target", "drafter"], engines)
    pushes = [
        [p.version, "committed" if p.committed else "refused", p.total_s, p.error]
        for p in answer.history[-10:]
    ]
    print_table("latest pushes", ["version", "outcome", "seconds", "error"], pushes)
