"""Real processes die under a real server: every request is answered, once and in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.chaos import run_kills
from tests.chaos.schedule import LOCAL_VICTIMS, Victim
from tests.support.proof import IS_LONG

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(3600 if IS_LONG else 600)]

SHORT = (Victim.ENGINE_CORE, Victim.TRAINER, Victim.HALTED_ENGINE_CORE)


def test_what_is_killed_loses_no_sample(tmp_path: Path) -> None:
    victims, num_kills = (LOCAL_VICTIMS, 24) if IS_LONG else (SHORT, len(SHORT))
    tally = run_kills(tmp_path, num_kills, seed=3, victims=victims)
    kills, samples = tally.kills, tally.samples
    assert kills.kills.total() == num_kills
    assert samples.checked > 0
    assert (samples.lost, samples.duplicated, samples.hangs) == (0, 0, 0), samples.causes
    assert (samples.wrong_tokens, samples.mixed_version) == (0, 0)
    assert kills.replaced_though_alive == 0
    assert kills.unaccounted == 0
    assert kills.leftover_processes == 0
    assert kills.leftover_files == 0, "shared memory left behind"
