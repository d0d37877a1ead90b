"""Kills while rollouts run: ``make chaos``.

Thousands of engines in memory die under the real service (``fakes``), then processes of a real
server with real engines (``processes``), then nodes of a cluster (``nodes``). Ends with one line of
JSON, and keeps it in ``benchmarks/results/chaos.json``, with the parts that were not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.results import circumstances, print_last_line, read_document, write_result
from tests.chaos.engine_kills import NUM_ENGINES, EngineKillRun
from tests.chaos.fake_kills import FakeKillRun
from tests.chaos.records import plain
from tests.chaos.schedule import LOCAL_VICTIMS, Victim, schedule
from tests.chaos.tally import Tally, load, save
from tests.support.cluster_nodes import ClusterNodes
from tests.support.server_process import engine_files, left_by_engines

PARTS = ("fakes", "processes", "nodes")
STATE_DIRECTORY = Path(".cache/chaos")
BAD = ("lost", "duplicated", "mixed_version", "wrong_tokens", "hangs", "unaccounted",
       "replaced_though_alive", "leftover_processes", "leftover_files")  # fmt: skip
"""Of which there have to be none."""


def run_kills(
    directory: Path,
    num_kills: int,
    seed: int,
    *,
    victims: Sequence[Victim] = LOCAL_VICTIMS,
    nodes: ClusterNodes | None = None,
    state: Path | None = None,
    commit: str = "",
) -> Tally:
    """Kill so many, or as many as are left to do of them.

    Args:
        state: where a run that is ended leaves what it has; a server is started anew for the rest.
    """
    earlier = Tally() if state is None else load(state, commit)
    num_done = earlier.kills.kills.total()
    if num_done >= num_kills:
        return earlier
    before = engine_files()
    run = EngineKillRun(directory, seed + num_done, nodes)
    now = Tally(kills=run.counts, samples=run.clients.counts)
    try:
        for victim, moment in itertools.islice(schedule(victims), num_done, num_kills):
            run.kill_once(victim, moment)
            if state is not None:
                save(state, earlier.plus(now), commit)
    except BaseException:  # an interrupt, too: no server stays behind
        run.abandon()
        raise
    run.close()
    left = left_by_engines(before)
    if left:
        print(f"left in shared memory: {sorted(left)}", file=sys.stderr)
    run.counts.leftover_files = len(left)
    total = earlier.plus(now)
    if state is not None:
        save(state, total, commit)
    return total


@contextlib.contextmanager
def cluster_nodes() -> Iterator[ClusterNodes]:
    """Room for one engine more than there are."""
    nodes = ClusterNodes(*[1] * (NUM_ENGINES + 1))
    try:
        yield nodes
    finally:
        nodes.shutdown()


def run_part(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The counts of one part, with what they are counts of."""
    about = circumstances()
    if part == "fakes":
        fake = asyncio.run(FakeKillRun(options.seed).run(options.fake_kills))
        return {"circumstances": about, **plain(fake)}
    state = STATE_DIRECTORY / f"{part}.json"
    arguments: dict[str, Any] = {"state": state, "commit": about["commit"]}
    num_kills = options.kills
    with contextlib.ExitStack() as stack:
        if part == "nodes":
            num_kills = options.node_kills
            nodes = stack.enter_context(cluster_nodes())
            arguments |= {"victims": (Victim.RAYLET,), "nodes": nodes}
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-chaos-")))
        tally = run_kills(place, num_kills, options.seed, **arguments)
    state.unlink(missing_ok=True)
    return {
        "circumstances": about,
        **plain(tally.samples),
        **plain(tally.kills),
    }


def report(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What all parts add up to."""
    real = [parts[name] for name in ("processes", "nodes") if name in parts]

    def total(name: str) -> int:
        return sum(part.get(name, 0) for part in parts.values())

    def percentiles(name: str) -> dict[str, float]:
        values = [value for part in real for value in part[name]]
        if not values:
            return {}
        figures = zip(("p50", "p95"), np.percentile(values, (50, 95)), strict=True)
        return {f"{name}_{label}": round(float(value), 2) for label, value in figures}

    by_victim = {victim: count for part in real for victim, count in part["kills"].items()}
    return {
        "bench": "chaos",
        "chaos": {
            "kills": sum(by_victim.values()),
            "fake_kills": parts.get("fakes", {}).get("kills", 0),
            **{name: total(name) for name in BAD},
            **percentiles("detection_s"),
            **percentiles("frozen_detection_s"),
            **percentiles("recovery_s"),
            **percentiles("beyond_start_s"),
        },
        "kills_by_victim": by_victim,
        "kills_by_moment": _added([part["moments"] for part in real]),
        "checked_samples": sum(part["checked"] for part in real),
        "committed_pushes": total("committed_pushes"),
        "connections_cut": total("connections_cut"),
        "checked_samples_of_fake_engines": parts.get("fakes", {}).get("checked_samples", 0),
        "requests_to_fake_engines": parts.get("fakes", {}).get("requests", {}),
    }


def _added(counts: list[dict[str, int]]) -> dict[str, int]:
    names = {name for count in counts for name in count}
    return {name: sum(count.get(name, 0) for count in counts) for name in sorted(names)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=90, help="Of processes of one server.")
    parser.add_argument("--node-kills", type=int, default=12, help="Of raylets.")
    parser.add_argument("--fake-kills", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    kept = read_document("chaos")
    parts: dict[str, dict[str, Any]] = {} if kept is None else dict(kept["raw"])
    for part in options.parts:
        parts[part] = run_part(part, options)
        result = report(parts)
        write_result(result, parts)
    print_last_line(result)
    return 1 if any(result["chaos"][name] for name in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
