"""Processes die inside the update window: no wrong sample, no half-loaded engine, no leftovers.

Only in the long form (``PROOF=1``): 60 kills, a server's start after each of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.weights import sweep_stale_segments
from tests.chaos.weight_kills import VICTIMS, KillRun
from tests.support.proof import IS_LONG
from tests.support.server_process import SHARED_MEMORY, shared_memory_files

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not IS_LONG, reason="the long form: PROOF=1"),
]

ROUNDS = 15


def test_what_is_killed_inside_a_push_leaves_one_version(tmp_path: Path) -> None:
    before = shared_memory_files()
    run = KillRun(tmp_path, seed=1)
    try:
        for _ in range(ROUNDS):
            for victim in VICTIMS:
                run.kill_once(victim)
    finally:
        run.close()
    sweep_stale_segments(SHARED_MEMORY)
    counts = run.counts
    print(counts)
    assert sum(counts.kills.values()) == ROUNDS * len(VICTIMS)
    assert counts.checked_samples > 0
    assert (counts.wrong_version_samples, counts.half_loaded, counts.hangs) == (0, 0, 0)
    assert shared_memory_files() - before == set(), "shared memory left behind"
