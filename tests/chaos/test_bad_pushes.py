"""Damaged, skewed and impossible pushes to a real engine: refused before anything changes.

Long form (``PROOF=1``): hundreds of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.bad_push_run import ALL_KINDS, run_bad_pushes
from tests.support.proof import IS_LONG

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROUNDS = 24 if IS_LONG else 2
"""Of every kind of damage; after each round a good push."""


async def test_no_damaged_push_is_ever_served(tmp_path: Path) -> None:
    counts = await run_bad_pushes(tmp_path, ROUNDS)
    assert counts.otherwise == []
    assert counts.refused == counts.sent
    assert counts.refused.total() == ROUNDS * len(ALL_KINDS)
    assert (counts.good, counts.wrong_version_samples, counts.leftovers) == (ROUNDS, 0, 0)
