"""The cost model an engine starts with: from a file, from an engine like it, or measured now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.calibration_run import MeasurableEngine, calibrate_itself
from rollout_server.speculation.calibration import (
    CalibrationKey,
    SelfCalibration,
    find_calibration,
)
from rollout_server.speculation.cost_model import CostModel
from shared.types import SpeculationMode

LOGGER = logging.getLogger(__name__)

SELF_CALIBRATED = "self"
"""Name that reports give to a cost model that this engine, or one like it, measured at start."""


class CalibratedEngine(MeasurableEngine, Protocol):
    async def set_cost_model(self, model: CostModel, name: str) -> None: ...


async def calibrate_at_start(
    engine: CalibratedEngine,
    spec: EngineSpec,
    key: CalibrationKey,
    *,
    vocab_size: int,
    max_model_len: int,
) -> SelfCalibration | None:
    """Give the engine's scheduler the cost model of this very combination.

    Returns:
        What was measured for that, or was handed on; None: there is a file, or no model at all.

    Raises:
        ConfigurationError: ``speculation.calibration`` names a file of another combination.
    """
    config = spec.speculation
    place = None if config.calibration is None else Path(config.calibration)
    calibration = find_calibration(key, place)
    if calibration is not None:
        await engine.set_cost_model(calibration.cost_model, calibration.name)
        LOGGER.info("engine %s: calibration %s", spec.engine_id, calibration.name)
        return None
    if config.mode is not SpeculationMode.ADAPTIVE or config.self_calibration_s == 0:
        return None
    own = next((earlier for earlier in spec.calibrations if earlier.key == key), None)
    if own is None:
        model = await calibrate_itself(
            engine,
            spec,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            budget_s=config.self_calibration_s,
        )
        own = None if model is None else SelfCalibration(key=key, cost_model=model)
    if own is not None:
        await engine.set_cost_model(own.cost_model, SELF_CALIBRATED)
    return own
