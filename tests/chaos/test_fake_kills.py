"""Engines die by the hundred: no sample is lost, doubled, or made of tokens that do not follow."""

from __future__ import annotations

import pytest

from tests.chaos.fake_kills import FakeKillRun
from tests.support.proof import IS_LONG

NUM_KILLS = 2000 if IS_LONG else 300


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_every_sample_comes_back_once_and_whole(seed: int) -> None:
    counts = await FakeKillRun(seed).run(NUM_KILLS)
    assert counts.kills == NUM_KILLS
    assert (counts.lost, counts.duplicated, counts.hangs) == (0, 0, 0)
    assert (counts.wrong_tokens, counts.mixed_version) == (0, 0)
    # It was worth the name: many answers, every kind of end, tokens that outlived their engines.
    assert counts.checked_samples > NUM_KILLS
    assert len(counts.requests) == 5
    assert counts.kept_tokens > NUM_KILLS
    assert counts.handed_over > 0
