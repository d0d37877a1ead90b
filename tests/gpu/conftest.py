"""Tests that need a CUDA GPU. One engine serves most of them: starting one takes half a minute.

They need no pytest plugin, so that they also run where only pytest is installed.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch

from benchmarks.harness.plugin_entry import ensure_plugin_entry_point
from benchmarks.harness.worker_probes import SERIALIZATION_VARIABLE
from tests.gpu.scenario import EngineOutputs, collect_outputs
from tests.support.models import make_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is skipped without a device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> EngineOutputs:
    """What one float32 engine with graphs said and did, in every draft length."""
    ensure_plugin_entry_point()
    os.environ[SERIALIZATION_VARIABLE] = "1"
    model = make_model(tmp_path_factory.mktemp("tiny"), seed=0)
    pushed_model = make_model(tmp_path_factory.mktemp("pushed"), seed=1)
    return asyncio.run(collect_outputs(model, pushed_model))
