"""What is committed survives a restart of the server, a kill included; what is not, does not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rollout_server.weights.commit_ledger import CommitLedger, CommitRecord
from shared.errors import ConfigurationError, ConflictError
from shared.types import EngineState
from shared.weights import SegmentKind, segment_name, sweep_stale_segments
from tests.fakes.weight_push import FakeEngine, PushWorld, StartWorld, worlds


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartWorld]:
    async with worlds(tmp_path) as make:
        yield make


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait(60)
    return child.pid


def kill(world: PushWorld) -> None:
    """What is left when a server is killed: its files, under the name of a process that is gone."""
    world.ledger.close()
    pid = dead_pid()
    for name in world.files():
        if name.startswith("slipstream-server"):
            version = int(name.rpartition("-v")[2].partition(".")[0])
            own, of_the_dead = (
                segment_name(owner, version, SegmentKind.SERVER) for owner in (os.getpid(), pid)
            )
            (world.directory / name).rename(world.directory / name.replace(own, of_the_dead))
    record = world.ledger.record_path
    if record.exists():
        text = record.read_text()
        for version in range(1, 9):
            own, of_the_dead = (
                segment_name(owner, version, SegmentKind.SERVER) for owner in (os.getpid(), pid)
            )
            text = text.replace(own, of_the_dead)
        record.write_text(text)


async def joined(world: PushWorld) -> FakeEngine:
    engine = FakeEngine("new", EngineState.STARTING)
    await world.join(engine)
    return engine


async def test_a_server_that_was_stopped_goes_on_with_what_it_had_committed(
    start: StartWorld,
) -> None:
    before = start()
    await before.push(1, 0, (3.0, 4.0))
    await before.push(2, 1, (5.0, 6.0))
    await before.coordinator.close()
    assert before.files() == [], "a stopped server leaves nothing in shared memory"
    after = start()
    assert after.coordinator.committed_version == 2
    assert (await joined(after)).loaded == [5.0, 6.0]
    for engine in after.pool.members:
        await after.join(engine)
    await after.push(3, 2, (7.0, 8.0))
    assert after.first.loaded == [7.0, 8.0]
    kept = [path.name for path in after.ledger.state_dir.glob("*.safetensors")]
    assert kept == [], "the file of the version before is gone"


async def test_a_server_that_was_killed_goes_on_with_what_it_had_committed(
    start: StartWorld,
) -> None:
    before = start()
    await before.push(1, 0, (3.0, 4.0))
    kill(before)
    assert sweep_stale_segments(before.directory) == []
    after = start()
    assert after.files() == after.server_files(1)
    assert after.coordinator.committed_version == 1
    assert (await joined(after)).loaded == [3.0, 4.0]


async def test_a_push_that_a_kill_left_unrecorded_was_never_there(start: StartWorld) -> None:
    before = start()
    await before.push(1, 0, (3.0, 4.0))
    before.first.commit_gate.clear()
    before.first.committing.clear()
    push = asyncio.create_task(before.push(2, 1, (5.0, 6.0)))
    await before.first.committing.wait()  # adopted, staged, not recorded
    kill(before)
    sweep_stale_segments(before.directory)
    after = start()
    assert after.coordinator.committed_version == 1
    assert [n for n in after.files() if n.startswith("slipstream-server")] == after.server_files(1)
    push.cancel()


async def test_the_same_push_is_answered_again_after_a_restart(start: StartWorld) -> None:
    before = start()
    request = before.request(1, 0)
    await before.coordinator.publish(request)
    await before.coordinator.close()
    after = start()
    response = await after.coordinator.publish(request)
    assert (response.version, response.num_bytes, response.engines) == (1, 8, [])
    assert not after.first.staging.is_set()


async def test_lost_weights_stop_the_start_unless_told_otherwise(start: StartWorld) -> None:
    before = start()
    await before.push(5, 0)
    await before.coordinator.close()
    (kept,) = before.ledger.state_dir.glob("*.safetensors")
    damaged = bytearray(kept.read_bytes())
    damaged[-1] ^= 1
    kept.write_bytes(damaged)
    with pytest.raises(ConfigurationError, match=r"version 5.*tensor 'b'.*weights\.lost_snapshot"):
        start()
    kept.unlink()
    after = start(lost_snapshot="model")
    assert after.coordinator.committed_version == 0
    assert after.coordinator.status().last_version_used == 5
    with pytest.raises(ConflictError, match="above 5"):
        await after.push(5, 0)
    await after.push(6, 0)
    assert after.coordinator.status().last_version_used == 6
    await after.coordinator.close()
    assert start().coordinator.committed_version == 6


async def test_versions_stay_used_over_a_second_restart(start: StartWorld) -> None:
    before = start()
    await before.push(5, 0)
    await before.coordinator.close()
    for path in before.ledger.state_dir.glob("*.safetensors"):
        path.unlink()
    await start(lost_snapshot="model").coordinator.close()
    with pytest.raises(ConflictError, match="above 5"):
        await start().push(4, 0)


async def test_a_server_that_keeps_nothing_starts_from_the_model(start: StartWorld) -> None:
    before = start(keep_on_stop=False)
    await before.push(1, 0)
    await before.coordinator.close()
    assert before.files() == []
    assert start().coordinator.committed_version == 0


async def test_a_second_server_on_the_same_record_is_refused(start: StartWorld) -> None:
    it = start()
    with pytest.raises(ConfigurationError, match="in use by another server"):
        CommitLedger(it.ledger.state_dir)


async def test_a_damaged_record_says_what_to_do(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0)
    await it.coordinator.close()
    it.ledger.record_path.write_text("{")
    with pytest.raises(ConfigurationError, match="remove it"):
        start()


async def test_on_a_shared_disk_a_commit_stays_where_it_is(
    start: StartWorld, tmp_path: Path
) -> None:
    disk = {"transport": "filesystem", "filesystem_dir": str(tmp_path / "shm")}
    before = start(**disk)
    await before.push(1, 0, (3.0, 4.0))
    await before.coordinator.close()
    assert before.files() == before.server_files(1)
    kill(before)
    after = start(**disk)
    assert (await joined(after)).loaded == [3.0, 4.0]
    await after.push(2, 1, (5.0, 6.0))
    assert after.files() == after.server_files(2)


def kept(world: PushWorld) -> list[str]:
    return sorted(path.name for path in world.ledger.state_dir.glob("slipstream-kept-*"))


async def test_files_that_were_kept_and_are_of_no_use_go_with_the_next_start(
    start: StartWorld,
) -> None:
    before = start()
    await before.push(2, 0, (3.0, 4.0))
    await before.coordinator.close()
    # Left by servers that were killed between keeping a file and recording it, or amid the copy.
    for name in ("v1.safetensors", "v3.safetensors", "v2.safetensors.partial"):
        (before.ledger.state_dir / f"slipstream-kept-{name}").touch()
    (before.ledger.state_dir / "notes").touch()
    after = start()
    assert kept(after) == ["slipstream-kept-v2.safetensors"]
    assert (after.ledger.state_dir / "notes").exists(), "not ours"
    assert (await joined(after)).loaded == [3.0, 4.0]


async def test_nothing_is_removed_where_a_start_is_refused(start: StartWorld) -> None:
    before = start()
    await before.push(2, 0)
    await before.coordinator.close()
    state_dir = before.ledger.state_dir
    (state_dir / "slipstream-kept-v2.safetensors").write_bytes(b"damaged")
    (state_dir / "slipstream-kept-v1.safetensors").touch()
    with pytest.raises(ConfigurationError, match="are lost"):
        start()
    assert len(kept(before)) == 2


async def test_a_server_that_stops_while_it_records_a_push_keeps_that_version_only(
    start: StartWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = start()
    await before.push(1, 0)
    await before.coordinator.close()
    world = start()
    for engine in world.pool.members:
        await world.join(engine)
    loop = asyncio.get_running_loop()
    is_recording, may_record = asyncio.Event(), threading.Event()
    write = world.ledger.write

    def write_later(record: CommitRecord) -> None:
        loop.call_soon_threadsafe(is_recording.set)
        assert may_record.wait(60)
        write(record)

    monkeypatch.setattr(world.ledger, "write", write_later)
    push = asyncio.create_task(world.push(2, 1, (5.0, 6.0)))
    await is_recording.wait()
    closing = asyncio.create_task(world.coordinator.close())
    await asyncio.sleep(0)  # it has cancelled the push
    may_record.set()
    await closing
    await asyncio.gather(push, return_exceptions=True)
    assert kept(world) == ["slipstream-kept-v2.safetensors"]
    assert world.files() == []
    assert (await joined(start())).loaded == [5.0, 6.0]
