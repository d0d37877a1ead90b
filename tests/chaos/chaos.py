"""Kills while rollouts run: ``make chaos``.

Thousands of engines in memory die under the real service, then processes of a real server with
real engines. Ends with one line of JSON, and keeps it in ``benchmarks/results/chaos.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.results import print_last_line, write_result
from tests.chaos.engine_kills import VICTIMS, EngineKillCounts, EngineKillRun
from tests.chaos.fake_kills import FakeKillCounts, FakeKillRun
from tests.support.server_process import left_in_shared_memory, shared_memory_files


def run_engine_kills(
    directory: Path, num_kills: int, seed: int, victims: tuple[str, ...] = VICTIMS
) -> tuple[EngineKillCounts, int]:
    """Victims in turn; the counts, and how many files are left in shared memory."""
    before = shared_memory_files()
    run = EngineKillRun(directory, seed=seed)
    try:
        for number in range(num_kills):
            run.kill_once(victims[number % len(victims)])
    except BaseException:  # an interrupt, too: no server stays behind
        run.abandon()
        raise
    run.close()
    return run.counts, len(left_in_shared_memory(before))


def report(fake: FakeKillCounts, real: EngineKillCounts, leftovers: int) -> dict[str, Any]:
    """What both runs add up to."""
    return {
        "bench": "chaos",
        "chaos": {
            "kills": real.kills.total(),
            "fake_kills": fake.kills,
            "lost": fake.lost + real.lost,
            "duplicated": fake.duplicated + real.duplicated,
            "mixed_version": fake.mixed_version + real.mixed_version,
            "wrong_tokens": fake.wrong_tokens + real.wrong_tokens,
            "hangs": fake.hangs + real.hangs,
            "leftovers": leftovers,
            "detection_s_p95": round(float(np.percentile(real.detection_s, 95)), 2),
            "recovery_s_p95": round(float(np.percentile(real.recovery_s, 95)), 2),
        },
        "kills_by_victim": dict(real.kills),
        "checked_samples": real.checked_samples,
        "checked_samples_of_fake_engines": fake.checked_samples,
        "requests_to_fake_engines": dict(fake.requests),
        "tokens_kept_from_dead_fake_engines": fake.kept_tokens,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="Of real processes.")
    parser.add_argument("--fake-kills", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    fake = asyncio.run(FakeKillRun(options.seed).run(options.fake_kills))
    with tempfile.TemporaryDirectory(prefix="slipstream-chaos-") as directory:
        real, leftovers = run_engine_kills(Path(directory), options.kills, options.seed)
    result = report(fake, real, leftovers)
    write_result(result, None)
    print_last_line(result)
    bad = ("lost", "duplicated", "mixed_version", "wrong_tokens", "hangs", "leftovers")
    return 1 if any(result["chaos"][name] for name in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
