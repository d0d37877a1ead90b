"""Calibrations on disk: a cost model, what it was measured on, and how well it fits. Pure but I/O.

A calibration holds for one combination of device, model shape, drafter and parallelism. The
combination is the key, its hash is in the file's name and in the file, and a file is used only for
the very combination it names: never another device's figures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rollout_server.speculation.cost_model import CostModel
from shared.config.base import SettingsModel
from shared.errors import ConfigurationError

LOGGER = logging.getLogger(__name__)

CALIBRATION_FORMAT = 1
DEFAULT_DIRECTORY = Path("deploy/calibration")


class CalibrationKey(SettingsModel):
    """Everything that step times depend on, apart from the load."""

    device: str
    """Name of the accelerator, or of the CPU and the cores an engine is given."""
    vllm_version: str
    dtype: str
    tensor_parallel_size: int
    model_shape: dict[str, int | str]
    """The model's dimensions, by their names in its ``config.json``."""
    drafter: dict[str, int | str | bool]
    """Scheme and its options, ``auto`` resolved."""
    enforce_eager: bool

    @property
    def hash(self) -> str:
        """First 12 digits of the SHA-256 of the key's canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def file_name(self) -> str:
        """Readable, and unique by the hash."""
        shape = self.model_shape
        words = (
            self.device,
            f"{shape.get('model_type', 'model')}-{shape.get('hidden_size', '')}"
            f"x{shape.get('num_hidden_layers', '')}",
            str(self.drafter.get("scheme", "")),
            f"tp{self.tensor_parallel_size}",
            self.hash,
        )
        return "-".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in words) + (
            ".json"
        )


class CalibrationPoint(SettingsModel):
    """One measured step shape."""

    num_reqs: int
    num_kv_tokens: int
    num_speculative_tokens: int
    num_steps: int
    median_s: float
    quartiles_s: tuple[float, float]


class Calibration(SettingsModel):
    """A file under ``deploy/calibration``."""

    format: int = CALIBRATION_FORMAT
    key: CalibrationKey
    key_hash: str
    cost_model: CostModel
    median_relative_error: float
    max_relative_error: float
    points: list[CalibrationPoint]
    circumstances: dict[str, Any]

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.key.file_name.removesuffix(".json")


def write_calibration(calibration: Calibration, directory: Path) -> Path:
    """Write it under its own name; whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / calibration.key.file_name
    temporary = path.with_suffix(".tmp")
    temporary.write_text(calibration.model_dump_json(indent=2) + "\n")
    temporary.replace(path)
    return path


def read_calibration(path: Path) -> Calibration:
    """Read a file.

    Raises:
        ConfigurationError: it is not a calibration, or its key was edited.
    """
    try:
        calibration = Calibration.model_validate_json(path.read_text())
    except (OSError, ValidationError) as exc:
        raise ConfigurationError(f"{path} is not a calibration: {exc}") from exc
    if calibration.format != CALIBRATION_FORMAT:
        raise ConfigurationError(
            f"{path} has calibration format {calibration.format}; this version reads "
            f"{CALIBRATION_FORMAT}: run slipstream calibrate again"
        )
    if calibration.key_hash != calibration.key.hash:
        raise ConfigurationError(
            f"{path}: the key's hash is {calibration.key.hash}, the file says "
            f"{calibration.key_hash}: a measured key must not be edited; run slipstream calibrate"
        )
    return calibration


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfCalibration:
    """What an engine measured at its start; its pool hands it on to those that start later."""

    key: CalibrationKey
    cost_model: CostModel


def find_calibration(key: CalibrationKey, place: Path | None) -> Calibration | None:
    """The calibration of this very combination, if there is one.

    Args:
        place: a file, which must be for this combination, or a directory of them; None: the
            default directory.

    Raises:
        ConfigurationError: a file was named that is unreadable or of another combination.
    """
    if place is not None and place.is_file():
        calibration = read_calibration(place)
        if calibration.key != key:
            raise ConfigurationError(
                f"speculation.calibration {place} is for another combination: "
                f"{_differences(calibration.key, key)}. Run slipstream calibrate here, or leave "
                "speculation.calibration out"
            )
        return calibration
    directory = place or DEFAULT_DIRECTORY
    if place is not None and not directory.is_dir():
        raise ConfigurationError(f"speculation.calibration {place} is neither file nor directory")
    path = directory / key.file_name
    return read_calibration(path) if path.is_file() else None


def _differences(theirs: CalibrationKey, ours: CalibrationKey) -> str:
    pairs = zip(theirs.model_dump().items(), ours.model_dump().values(), strict=True)
    return "; ".join(
        f"{name} is {their!r} there and {our!r} here"
        for (name, their), our in pairs
        if their != our
    )
