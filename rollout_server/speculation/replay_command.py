"""``python -m rollout_server.speculation.replay_command TRACE``: a recorded run, decided again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from rollout_server.speculation.replay import ReplayReport, replay
from rollout_server.speculation.trace import TraceStart, read_trace
from rollout_server.speculation_changes import patched_policy
from shared.errors import InvalidRequestError
from shared.schemas.speculation import SpeculationPatch

EXIT_DIFFERENT = 1
EXIT_USAGE = 2
PIPED_WIDTH = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done; 1 unchanged settings decided otherwise than recorded; 2 bad usage."""
    parser = argparse.ArgumentParser(prog="slipstream speculation replay", description=__doc__)
    parser.add_argument("trace", type=Path, metavar="TRACE", help="file of an engine's trace")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="set_")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args(argv)
    try:
        changes = parse_changes(arguments.set_)
        report = replay_file(arguments.trace, changes)
    except OSError as exc:
        print(f"error: {arguments.trace}: {exc.strerror}", file=sys.stderr)
        return EXIT_USAGE
    except InvalidRequestError as exc:
        print(f"error: --set: {exc.message}", file=sys.stderr)
        return EXIT_USAGE
    except ValueError as exc:  # not a trace, or not a field
        print(f"error: {exc}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.as_json:
        print(json.dumps(to_json(report, changes), indent=2))
    else:
        show(report, changes, Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
    if changes is None and report.num_different:
        print(
            f"error: {report.num_different} of {report.num_steps} decisions came out otherwise "
            "than recorded although nothing was changed: the controller is not deterministic, or "
            "the trace is another version's",
            file=sys.stderr,
        )
        return EXIT_DIFFERENT
    return 0


def parse_changes(texts: Sequence[str]) -> SpeculationPatch | None:
    """The patch that ``FIELD=VALUE`` texts stand for; None of nothing.

    Raises:
        ValueError: names field and value at fault.
    """
    if not texts:
        return None
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} is not FIELD=VALUE")
        pairs[name.strip().removeprefix("speculation.")] = value.strip()
    try:
        return SpeculationPatch.model_validate_strings(pairs)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(SpeculationPatch.model_fields)
        if first["type"] == "extra_forbidden":
            raise ValueError(f"--set {where}: no such field; there are: {known}") from exc
        value = f" {pairs[where]!r}" if where in pairs else ""
        raise ValueError(f"--set {where or texts[-1]}{value}: {first['msg']}") from exc


def replay_file(path: Path, changes: SpeculationPatch | None) -> ReplayReport:
    """Rerun a trace file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a whole trace.
        InvalidRequestError: the trace's engine could not have followed ``changes``.
    """
    events = read_trace(path)
    first = next(events, None)
    if first is None:
        raise ValueError(f"{path} has no whole line: the engine has not reported yet")
    if changes is not None and isinstance(first, TraceStart):
        capacity = first.kv_capacity_tokens
        capacities = {first.engine_id: capacity} if capacity else {}
        patched_policy(first.policy, changes, first.max_draft_length, capacities)
    return replay(chain([first], events), changes)


def to_json(report: ReplayReport, changes: SpeculationPatch | None) -> dict[str, object]:
    """For programs."""
    return {
        "engine_id": report.engine_id,
        "changes": {} if changes is None else changes.model_dump(mode="json", exclude_none=True),
        "num_steps": report.num_steps,
        "num_different": report.num_different,
        "num_steps_per_k": {
            "recorded": dict(sorted(report.steps_per_k_recorded.items())),
            "replayed": dict(sorted(report.steps_per_k_replayed.items())),
        },
        "num_steps_per_reason": dict(report.steps_per_reason_replayed.most_common()),
        "first_differences": [asdict(difference) for difference in report.first_differences],
    }


def show(report: ReplayReport, changes: SpeculationPatch | None, console: Console) -> None:
    """For people."""
    given = {} if changes is None else changes.model_dump(mode="json", exclude_none=True)
    settings = ", ".join(f"{name}={value}" for name, value in given.items()) or "as recorded"
    console.print(
        f"{report.engine_id}: {report.num_steps} steps, {report.num_different} decided otherwise "
        f"(settings: {settings})",
        highlight=False,
    )
    histogram = Table("draft length", "recorded", "replayed", title="steps", title_justify="left")
    lengths = sorted({*report.steps_per_k_recorded, *report.steps_per_k_replayed})
    for k in lengths:
        counts = (report.steps_per_k_recorded[k], report.steps_per_k_replayed[k])
        histogram.add_row(str(k), *(_count(count, report.num_steps) for count in counts))
    console.print(histogram)
    reasons = Table("reason", "replayed")
    for reason, count in report.steps_per_reason_replayed.most_common():
        reasons.add_row(reason.value, _count(count, report.num_steps))
    console.print(reasons)
    if report.first_differences:
        title = f"first {len(report.first_differences)} of {report.num_different} differences"
        table = Table("step", "running", "recorded", "replayed", title=title, title_justify="left")
        for each in report.first_differences:
            table.add_row(
                str(each.step),
                str(each.num_running_reqs),
                f"{each.recorded} ({each.recorded_reason.value})",
                f"{each.replayed} ({each.replayed_reason.value})",
            )
        console.print(table)


def _count(count: int, of: int) -> str:
    return f"{count} ({count / of:.1%})" if of else str(count)


if __name__ == "__main__":
    sys.exit(main())
