"""``slipstream weights``: which weights a running server serves, and whether it really does."""

from __future__ import annotations

import typer

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
from shared.progress import waiting
from shared.schemas.weights import AuditRequest, AuditResponse, WeightsResponse

weights_app = typer.Typer(help="See and audit which weights are served.", no_args_is_help=True)


@weights_app.command("show")
def show_weights(
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """The committed version, the engines' versions and the latest pushes."""
    with connect(url, timeout_s, api_key_file, ca_file) as client:
        answer = client.get("/v1/weights", WeightsResponse)
    if as_json:
        print_json(answer)
        return
    if answer.push is not None:
        typer.echo(f"latest push: version {answer.push.version}, {answer.push.phase.value}")
    engines = [[e.engine_id, e.target_version, e.drafter_version] for e in answer.engines]
    title = f"committed version {answer.committed_version}"
    print_table(title, ["engine", "target", "drafter"], engines)
    pushes = [
        [p.version, "committed" if p.committed else "refused", p.total_s, p.error]
        for p in answer.history[-10:]
    ]
    print_table("latest pushes", ["version", "outcome", "seconds", "error"], pushes)


@weights_app.command("audit")
def audit_weights(
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    timeout_s: TimeoutOption = 300.0,
    as_json: JsonOption = False,
) -> None:
    """Compare what every engine computes with, with what is committed. Exit code 1 if not equal.

    Engines go on generating; one with other weights is taken out and replaced.
    """
    with (
        connect(url, timeout_s, api_key_file, ca_file) as client,
        waiting("comparing the weights of every engine"),
    ):
        answer = client.send("POST", "/v1/weights/audit", AuditRequest(), AuditResponse)
    if as_json:
        print_json(answer)
    else:
        rows = [
            [e.engine_id, e.num_equal, e.num_skipped, len(e.different), round(e.audit_s, 1)]
            for e in answer.engines
        ]
        columns = ["engine", "equal", "not comparable", "different", "seconds"]
        notes = [
            f"{e.engine_id}: {', '.join(e.different[:5])}" for e in answer.engines if e.different
        ]
        notes += [f"{engine_id}: {error}" for engine_id, error in answer.errors.items()]
        print_table(f"audit of version {answer.version}", columns, rows, "; ".join(notes) or None)
    if not answer.is_intact:
        raise typer.Exit(1)
