"""The table of faults of the weight path: ``make faults-weights``.

Bad pushes to a real engine, then kills inside the update window of a real server. Ends with one
line of JSON, and keeps it in ``benchmarks/results/weight_faults.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.results import circumstances, print_last_line, write_result
from shared.weights import sweep_stale_segments
from tests.chaos.bad_push_run import BadPushCounts, run_bad_pushes
from tests.chaos.records import added, load_records, restored, save_records
from tests.chaos.weight_kills import VICTIMS, Counts, KillRun
from tests.support.server_process import SHARED_MEMORY, engine_files, left_by_engines

STATE = Path(".cache/chaos/weight_faults.json")


def run_kills(
    directory: Path, num_rounds: int, seed: int, state: Path | None = None
) -> tuple[Counts, int]:
    """Each victim so often inside the update window, and whenever it comes too late for that once
    more; the counts, and how many files are left in shared memory.

    Args:
        state: where a run that is ended leaves what it has, for the next one on the same commit.
    """
    commit = str(circumstances()["commit"])
    saved = {} if state is None else load_records(state, commit)
    total = earlier = restored(Counts, saved["kills"]) if saved else Counts()
    before = engine_files()
    run = KillRun(directory, seed=seed + earlier.kills.total())
    try:
        while todo := [victim for victim in VICTIMS if total.kills_inside[victim] < num_rounds]:
            for victim in todo:
                run.kill_once(victim)
                total = added(earlier, run.counts)
                if state is not None:
                    save_records(state, commit, kills=total)
    except BaseException:  # an interrupt, too: no server stays behind
        run.abandon()
        raise
    run.close()
    sweep_stale_segments(SHARED_MEMORY)  # as the next trainer or server does
    return total, len(left_by_engines(before))


def table(bad: BadPushCounts, kills: Counts, leftovers: int) -> dict[str, Any]:
    """What both runs add up to."""
    return {
        "bench": "weight_faults",
        "faults": {
            "bad_pushes": bad.sent.total(),
            "refused": bad.refused.total(),
            "kills": kills.kills.total(),
            "wrong_version_samples": bad.wrong_version_samples + kills.wrong_version_samples,
            "half_loaded": kills.half_loaded,
            "hangs": kills.hangs,
            "leftovers": bad.leftovers + leftovers,
        },
        "bad_pushes_by_kind": dict(bad.refused),
        "refused_otherwise": bad.otherwise,
        "kills_by_victim": dict(kills.kills),
        "kills_inside_the_window": dict(kills.kills_inside),
        "pushes_committed_despite_a_kill": kills.committed_pushes,
        "checked_samples": kills.checked_samples,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bad-push-rounds", type=int, default=24)
    parser.add_argument("--kill-rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slipstream-faults-") as directory:
        root = Path(directory)
        (root / "bad").mkdir()
        (root / "kills").mkdir()
        bad = asyncio.run(run_bad_pushes(root / "bad", options.bad_push_rounds))
        kills, leftovers = run_kills(root / "kills", options.kill_rounds, options.seed, STATE)
    STATE.unlink(missing_ok=True)
    result = table(bad, kills, leftovers)
    write_result(result, None)
    print_last_line(result)
    faults = result["faults"]
    is_clean = faults["refused"] == faults["bad_pushes"] and not any(
        faults[name] for name in ("wrong_version_samples", "half_loaded", "hangs", "leftovers")
    )
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
