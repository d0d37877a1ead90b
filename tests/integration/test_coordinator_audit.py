"""Audits: engines whose weights are not the committed ones are taken out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.errors import EngineError, UnavailableError
from shared.types import EngineState
from tests.fakes.weight_push import StartWorld, worlds


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartWorld]:
    async with worlds(tmp_path) as make:
        yield make


async def test_intact_engines_go_on(start: StartWorld) -> None:
    it = start()
    report = await it.coordinator.audit()
    assert (report.version, report.is_intact) == (0, True)
    assert it.first.audited == ["model"], "version 0 is the model directory"
    await it.push(1, 0)
    report = await it.coordinator.audit()
    assert (report.version, [e.num_equal for e in report.engines]) == (1, [2, 2])
    snapshot = it.coordinator.snapshot()
    assert snapshot is not None
    assert it.second.audited[-1] == snapshot.path


async def test_an_engine_with_other_weights_is_taken_out(start: StartWorld) -> None:
    it = start()
    it.second.different = ["model.norm.weight"]
    report = await it.coordinator.audit()
    assert (report.is_intact, report.engines_removed) == (False, ["e1"])
    assert (it.first.state, it.second.state) == (EngineState.SERVING, EngineState.DEAD)


async def test_an_engine_that_cannot_be_asked_goes_on(start: StartWorld) -> None:
    it = start()
    it.first.audit_error = EngineError("timeout")
    report = await it.coordinator.audit()
    assert (report.is_intact, report.errors) == (True, {"e0": "timeout"})
    assert it.first.state is EngineState.SERVING


async def test_every_second_push_is_audited_when_asked_for(start: StartWorld) -> None:
    it = start(audit_every=2)
    await it.push(1, 0)
    await asyncio.sleep(0.01)
    assert it.first.audited == []
    await it.push(2, 1)
    await it.push(3, 2)
    await asyncio.sleep(0.01)
    assert len(it.first.audited) == 1


async def test_an_audit_waits_for_a_push(start: StartWorld) -> None:
    it = start(lock_timeout_s=0.05)
    it.first.commit_gate.clear()
    push = asyncio.create_task(it.push(1, 0))
    await it.first.committing.wait()
    with pytest.raises(UnavailableError, match="integrity audit"):
        await it.coordinator.audit()
    it.first.commit_gate.set()
    await push
    assert (await it.coordinator.audit()).version == 1
