"""Where an engine's first cost model comes from: a file, an engine like it, or itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.start_calibration import SELF_CALIBRATED, calibrate_at_start
from rollout_server.speculation.calibration import SelfCalibration, write_calibration
from rollout_server.speculation.cost_model import CostModel, conservative_model
from shared.types import SpeculationMode
from tests.unit.test_calibration_files import calibration, key
from tests.unit.test_calibration_run import TimedEngine, spec

EARLIER = SelfCalibration(key=key(), cost_model=conservative_model())


class Engine(TimedEngine):
    """Notes the cost models it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[CostModel, str]] = []

    async def set_cost_model(self, model: CostModel, name: str) -> None:
        self.given.append((model, name))


async def started(
    engine: Engine, *earlier: SelfCalibration, **speculation: Any
) -> SelfCalibration | None:
    settings = {"mode": SpeculationMode.ADAPTIVE, **speculation}
    own = replace(
        spec(),
        calibrations=earlier,
        speculation=spec().speculation.model_copy(update=settings),
    )
    return await calibrate_at_start(engine, own, key(), vocab_size=100, max_model_len=512)


async def test_the_first_of_its_kind_measures_itself_and_says_what_it_found() -> None:
    engine = Engine()
    measured = await started(engine)
    assert engine.requests
    assert measured is not None
    assert measured.key == key()
    assert engine.given == [(measured.cost_model, SELF_CALIBRATED)]


async def test_a_later_one_is_given_what_was_measured_and_measures_nothing() -> None:
    engine = Engine()
    other = SelfCalibration(key=key(dtype="float32"), cost_model=conservative_model())
    assert await started(engine, other, EARLIER) == EARLIER
    assert engine.requests == []
    assert engine.given == [(EARLIER.cost_model, SELF_CALIBRATED)]


async def test_what_another_combination_measured_is_never_used() -> None:
    engine = Engine()
    other = SelfCalibration(key=key(device="Another CPU"), cost_model=conservative_model())
    measured = await started(engine, other)
    assert engine.requests
    assert measured is not None
    assert measured.cost_model != other.cost_model


async def test_a_file_goes_before_both(tmp_path: Path) -> None:
    engine = Engine()
    path = write_calibration(calibration(key()), tmp_path)
    assert await started(engine, EARLIER, calibration=str(path)) is None
    assert engine.requests == []
    assert [name for _, name in engine.given] == [calibration(key()).name]


@pytest.mark.parametrize(
    "speculation", [{"mode": SpeculationMode.OFF}, {"self_calibration_s": 0.0}]
)
async def test_who_would_not_measure_is_given_nothing(speculation: dict[str, Any]) -> None:
    engine = Engine()
    assert await started(engine, EARLIER, **speculation) is None
    assert engine.given == []
    assert engine.requests == []
