"""``slipstream engines``: look at a running server's engines, scale them."""

from __future__ import annotations

import time
from typing import Annotated

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
from shared.progress import ProgressBar
from shared.schemas.engines import EnginesResponse, ScaleRequest
from shared.types import EngineState

engines_app = typer.Typer(help="List and scale the rollout engines.", no_args_is_help=True)

WAIT_POLL_S = 0.5
READY = frozenset({EngineState.SERVING, EngineState.PAUSED, EngineState.SYNCING})


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
    wait_s: Annotated[
        float, typer.Option("--wait", min=0.0, metavar="SECONDS", help="Wait until they serve.")
    ] = 0.0,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Set the number of engines; new ones start, surplus ones finish their work and go."""
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        answer = client.send("PUT", "/v1/engines", ScaleRequest(count=count), EnginesResponse)
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
            *(e.engine_id, e.state, e.cpu_cores, e.target_version, e.drafter_version),
            *(e.num_running_reqs, e.num_waiting_reqs),
            *(f"{e.kv_cache_usage:.0%}", round(e.uptime_s)),
        ]
        for e in answer.engines
    ]
    errors = "; ".join(f"{e.engine_id}: {e.error}" for e in answer.engines if e.error)
    print_table(f"engines (target {answer.target_count})", columns, rows, errors or None)
