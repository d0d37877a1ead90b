"""``slipstream engines``, ``pause`` and ``resume``: a running server's engines."""

from __future__ import annotations

import time
from typing import Annotated
from urllib.parse import quote

import typer

from shared.cli.api_client import ApiClient
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
from shared.errors import UnavailableError
from shared.pool_types import CircuitState, EngineHealth, RestartState
from shared.progress import ProgressBar
from shared.schemas.engines import (
    EnginesResponse,
    EngineStatus,
    LeaveRequest,
    PauseRequest,
    ScaleRequest,
)
from shared.types import EngineState, PauseMode

engines_app = typer.Typer(
    help="List, scale, drain and remove the rollout engines.", no_args_is_help=True
)

WAIT_POLL_S = 0.5
READY = frozenset({EngineState.SERVING, EngineState.PAUSED, EngineState.SYNCING})

EngineIdArgument = Annotated[str, typer.Argument(help="As `slipstream engines list` names it.")]
ReplaceOption = Annotated[
    bool, typer.Option("--replace/--no-replace", help="Start another in its place.")
]


@engines_app.command("list")
def list_engines(
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Engines with their state, load and weight versions."""
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        show_engines(client.get("/v1/engines", EnginesResponse), as_json)


@engines_app.command("scale")
def scale_engines(
    count: Annotated[int, typer.Argument(min=0, help="How many engines there shall be.")],
    pool: Annotated[
        str | None, typer.Option("--pool", help="Of which pool; only needed with several.")
    ] = None,
    wait_s: Annotated[
        float, typer.Option("--wait", min=0.0, metavar="SECONDS", help="Wait until they serve.")
    ] = 0.0,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Set the number of engines; new ones start, surplus ones finish their work and go.

    Ends a quarantine, also with the count there is.
    """
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        body = ScaleRequest(count=count, pool=pool)
        answer = client.send("PUT", "/v1/engines", body, EnginesResponse)
        if wait_s:
            answer = wait_until_settled(client, answer, wait_s)
    show_engines(answer, as_json)


def wait_until_settled(
    client: ApiClient, answer: EnginesResponse, wait_s: float
) -> EnginesResponse:
    """Poll until the engines that are wanted serve.

    Raises:
        UnavailableError: they do not within ``wait_s``.
    """
    count = answer.target_count
    deadline = time.monotonic() + wait_s
    with ProgressBar("engines", count, completed=num_ready(answer)) as bar:
        while not has_settled(answer):
            states = ", ".join(f"{e.engine_id} {e.state}" for e in answer.engines) or "none"
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"waited {wait_s:g} s (--wait) for {count} serving engines; now: {states}"
                )
            bar.show(num_ready(answer), states)
            time.sleep(WAIT_POLL_S)
            answer = client.get("/v1/engines", EnginesResponse)
        bar.show(count)
    return answer


@engines_app.command("drain")
def drain_engine(
    engine_id: EngineIdArgument,
    replace: ReplaceOption = True,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Let an engine finish what it has, then stop it."""
    path = f"/v1/engines/{quote(engine_id, safe='')}/drain"
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        body = LeaveRequest(replace=replace)
        show_engines(client.send("POST", path, body, EnginesResponse), as_json)


@engines_app.command("remove")
def remove_engine(
    engine_id: EngineIdArgument,
    replace: ReplaceOption = True,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Stop an engine now; what it was doing goes on elsewhere."""
    path = f"/v1/engines/{quote(engine_id, safe='')}?replace={str(replace).lower()}"
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        show_engines(client.send("DELETE", path, None, EnginesResponse), as_json)


def pause(
    mode: Annotated[
        PauseMode, typer.Option("--mode", help="Running sequences: freeze, finish, or end them.")
    ] = PauseMode.KEEP,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Stop generating on every engine until `slipstream resume`; requests queue."""
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        body = PauseRequest(mode=mode)
        show_engines(client.send("POST", "/v1/pause", body, EnginesResponse), as_json)


def resume(
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Generate again after `slipstream pause`."""
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        show_engines(client.send("POST", "/v1/resume", None, EnginesResponse), as_json)


def has_settled(answer: EnginesResponse) -> bool:
    """Whether exactly the wanted number of engines is there, and each can take work."""
    live = [engine for engine in answer.engines if engine.state is not EngineState.DEAD]
    return len(live) == answer.target_count == num_ready(answer)


def num_ready(answer: EnginesResponse) -> int:
    """Engines that take work."""
    return sum(engine.state in READY for engine in answer.engines)


def show_engines(answer: EnginesResponse, as_json: bool) -> None:
    """Print the engines."""
    if as_json:
        print_json(answer)
        return
    columns = ["engine", "state", "cores", "target", "drafter", "running", "waiting", "KV", "up s"]
    rows = [
        [
            *(_name(e, answer), _state(e)),
            *(e.cpu_cores, e.target_version, e.drafter_version),
            *(e.num_running_reqs, e.num_waiting_reqs),
            *(f"{e.kv_cache_usage:.0%}", round(e.uptime_s)),
        ]
        for e in answer.engines
    ]
    errors = "; ".join(
        [f"{e.engine_id}: {e.error}" for e in answer.engines if e.error]
        + [
            f"pool {pool.name} is quarantined and replaces no engine until `slipstream engines "
            f"scale`; its last loss: {pool.last_loss}"
            for pool in answer.pools
            if pool.restart_state is RestartState.QUARANTINED
        ]
    )
    paused = f", paused: {answer.pause_mode}" if answer.pause_mode else ""
    print_table(f"engines (target {answer.target_count}{paused})", columns, rows, errors or None)


def _name(engine: EngineStatus, answer: EnginesResponse) -> str:
    """With its pool where there are several."""
    return f"{engine.engine_id} ({engine.pool})" if len(answer.pools) > 1 else engine.engine_id


def _state(engine: EngineStatus) -> str:
    words = [engine.state.value]
    if engine.health is not EngineHealth.HEALTHY:
        words.append(engine.health.value)
    if engine.circuit is not CircuitState.CLOSED:
        words.append(f"circuit {engine.circuit.value}")
    return ", ".join(words)
