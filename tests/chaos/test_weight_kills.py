"""Processes die inside the update window: no wrong sample, no half-loaded engine, no leftovers.

Only in the long form (``PROOF=1``): 60 kills, a server's start after each of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.faults import run_kills
from tests.chaos.weight_kills import VICTIMS
from tests.support.proof import IS_LONG

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not IS_LONG, reason="the long form: PROOF=1"),
]

ROUNDS = 15


def test_what_is_killed_inside_a_push_leaves_one_version(tmp_path: Path) -> None:
    counts, leftovers = run_kills(tmp_path, ROUNDS, seed=1)
    assert all(counts.kills_inside[victim] >= ROUNDS for victim in VICTIMS)
    assert counts.checked_samples > 0
    assert (counts.wrong_version_samples, counts.half_loaded, counts.hangs) == (0, 0, 0)
    assert leftovers == 0, "shared memory left behind"
