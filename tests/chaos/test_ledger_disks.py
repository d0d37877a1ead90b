"""The ledger on a disk that is full, or may not be written: a clear error, and nothing lost.

On a real file system of a megabyte, mounted for the test; skipped where that is not permitted.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_server.rollouts.ledger import RolloutLedger
from rollout_server.rollouts.ledger_opening import open_ledger_file
from shared.errors import ConfigurationError
from tests.fakes.engine import FakeEngine
from tests.fakes.rollout_calls import body, post
from tests.fakes.service import fake_service, running, until


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "slipstream-test", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Take all the room there is; the file that does."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler
    raise AssertionError("the disk has no end")


def test_a_full_disk_is_found_at_the_start(disk: Path) -> None:
    fill(disk)
    with pytest.raises(ConfigurationError, match=r"cannot be used: .*(full|No space)") as caught:
        open_ledger_file(disk / "rollouts.sqlite3")
    assert caught.value.param == "server.ledger"


@pytest.mark.parametrize("is_there", [False, True])
def test_a_disk_that_may_only_be_read_is_found_at_the_start(disk: Path, is_there: bool) -> None:
    if is_there:
        open_ledger_file(disk / "rollouts.sqlite3").close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ConfigurationError, match="Read-only file system"):
        open_ledger_file(disk / "rollouts.sqlite3")


async def test_a_disk_that_fills_up_refuses_requests_and_loses_no_group(disk: Path) -> None:
    path = disk / "rollouts.sqlite3"
    engine = FakeEngine("e")
    engine.unblocked.clear()
    ledger = await RolloutLedger.open(path)
    service = fake_service([engine], ledger=ledger)
    large = body("large", num_prompts=1)
    large["prompts"][0]["metadata"] = {"filler": "x" * 100_000}
    async with running(service) as client:
        task = asyncio.create_task(client.post("/v1/rollouts", json=large))
        await until(lambda: engine.num_running == 2, "the request to run")
        filler = fill(disk)
        engine.unblocked.set()
        first = (await task).json()
        refused = await client.post("/v1/rollouts", json={**large, "request_id": "other"})
        assert refused.status_code == 503
        assert "disk is full" in refused.json()["error"]["message"]
        filler.unlink()
        await until(lambda: ledger.stats.num_unwritten == 0, "the group to be recorded")
        await post(client, body("small"))
    engine = FakeEngine("e")
    service = fake_service([engine], ledger=await RolloutLedger.open(path))
    async with running(service) as client:
        assert (await client.get("/v1/rollouts/large")).json()["result"] == first
        assert (await client.get("/v1/rollouts/other")).status_code == 404
        service.router.accounts.check()
        assert service.router.accounts.num_accepted == 6
    assert engine.requests == []
