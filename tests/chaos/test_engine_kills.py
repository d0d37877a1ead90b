"""Real processes die under a real server: every request is answered, once and in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.chaos import run_engine_kills
from tests.chaos.engine_kills import VICTIMS
from tests.support.proof import IS_LONG

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(3600 if IS_LONG else 600)]


def test_what_is_killed_loses_no_sample(tmp_path: Path) -> None:
    num_kills = 20 if IS_LONG else 3
    counts, leftovers = run_engine_kills(tmp_path, num_kills, seed=3, victims=VICTIMS[:4])
    assert counts.kills.total() == num_kills
    assert counts.checked_samples > 0
    assert (counts.lost, counts.duplicated, counts.hangs) == (0, 0, 0)
    assert (counts.wrong_tokens, counts.mixed_version) == (0, 0)
    assert leftovers == 0, "shared memory left behind"
