"""A calibration is used for the very combination it was measured on, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout_server.speculation.calibration import (
    Calibration,
    CalibrationKey,
    find_calibration,
    read_calibration,
    write_calibration,
)
from rollout_server.speculation.cost_model import conservative_model
from shared.errors import ConfigurationError


def key(**changes: Any) -> CalibrationKey:
    fields = {
        "device": "Some CPU @ 2 GHz cores 0-1",
        "vllm_version": "0.32.0",
        "dtype": "bfloat16",
        "tensor_parallel_size": 1,
        "model_shape": {"model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 10},
        "drafter": {"scheme": "int8", "quantize_lm_head": True, "exclude": ""},
        "enforce_eager": True,
    }
    return CalibrationKey.model_validate({**fields, **changes})


def calibration(of: CalibrationKey) -> Calibration:
    return Calibration(
        key=of,
        key_hash=of.hash,
        cost_model=conservative_model(),
        median_relative_error=0.01,
        max_relative_error=0.1,
        points=[],
        circumstances={},
    )


def test_a_written_calibration_is_found_by_its_key(tmp_path: Path) -> None:
    path = write_calibration(calibration(key()), tmp_path)
    assert path.name == f"some-cpu-2-ghz-cores-0-1-qwen3-2048x10-int8-tp1-{key().hash}.json"
    assert find_calibration(key(), tmp_path) == calibration(key())
    assert find_calibration(key(), path) == calibration(key())


@pytest.mark.parametrize(
    "other",
    [
        {"device": "Another CPU cores 0-1"},
        {"vllm_version": "0.33.0"},
        {"tensor_parallel_size": 2},
        {"drafter": {"scheme": "int4", "quantize_lm_head": True, "exclude": ""}},
        {"model_shape": {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 10}},
        {"dtype": "float32"},
    ],
)
def test_another_combination_finds_nothing_and_is_refused_a_file_named_for_it(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    path = write_calibration(calibration(key()), tmp_path)
    assert find_calibration(key(**other), tmp_path) is None
    with pytest.raises(ConfigurationError, match=f"another combination: {next(iter(other))}"):
        find_calibration(key(**other), path)


def test_an_edited_key_or_file_is_refused(tmp_path: Path) -> None:
    path = write_calibration(calibration(key()), tmp_path)
    document = json.loads(path.read_text())
    document["key"]["device"] = "Another CPU"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigurationError, match="must not be edited"):
        read_calibration(path)
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="is not a calibration"):
        read_calibration(path)


def test_a_place_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither file nor directory"):
        find_calibration(key(), tmp_path / "nowhere")
