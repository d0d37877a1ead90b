"""How many engines the load calls for: never outside the limits, never back and forth."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.autoscaling.policy import AutoscalingPolicy, Load, ScalingDecision
from shared.config.autoscaling import AutoscalingConfig
from shared.pool_types import ScalingReason
from shared.types import EngineState
from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running, until

ROOM = 64
TICK_S = 5.0
MAX_COUNT = 8


def config(**settings: Any) -> AutoscalingConfig:
    return AutoscalingConfig(enabled=True, **settings)


class Cluster:
    """An ideal pool: engines start after a while, and samples fill them evenly."""

    def __init__(self, policy: AutoscalingPolicy, count: int = 1, start_s: float = 20.0) -> None:
        self.policy = policy
        self.time_s = 0.0
        self.count = count
        self.start_s = start_s
        self.ready_at_s = [0.0] * count
        self.counts: list[int] = []
        self.reasons: list[ScalingReason] = []

    def tick(self, num_samples: int, **changes: Any) -> ScalingDecision:
        self.time_s += TICK_S
        num_ready = sum(ready_s <= self.time_s for ready_s in self.ready_at_s)
        room = num_ready * ROOM
        load: dict[str, Any] = {
            "time_s": self.time_s,
            "target_count": self.count,
            "num_ready": num_ready,
            "num_queued_samples": max(0, num_samples - room),
            "num_running_samples": min(num_samples, room),
            "room_per_engine": ROOM,
            "kv_cache_usage": 0.8 * min(num_samples, room) / max(1, room),
            "num_waiting_in_engines": 0,
        }
        decision = self.policy.decide(Load(**{**load, **changes}))
        started = [self.time_s + self.start_s] * (decision.count - self.count)
        self.ready_at_s = (self.ready_at_s + started)[: decision.count]
        self.count = decision.count
        self.counts.append(self.count)
        if len(self.counts) > 1 and self.counts[-2] != self.count:
            self.reasons.append(decision.reason)
        return decision

    def run(self, num_samples: int, duration_s: float, **changes: Any) -> None:
        for _ in range(int(duration_s / TICK_S)):
            self.tick(num_samples, **changes)

    @property
    def num_turns(self) -> int:
        """Changes of direction."""
        changes = [b - a for a, b in pairwise(self.counts) if a != b]
        return sum((a > 0) != (b > 0) for a, b in pairwise(changes))


def cluster(count: int = 1, **settings: Any) -> Cluster:
    return Cluster(AutoscalingPolicy(config(**settings), MAX_COUNT), count)


def test_a_queue_that_lasts_is_answered_with_engines_that_hold_it() -> None:
    pool = cluster()
    pool.run(num_samples=5 * ROOM + ROOM // 2, duration_s=600)
    assert pool.count == 5
    assert pool.counts[0] == 1, "not at once"
    assert set(pool.reasons) == {ScalingReason.QUEUE}


def test_it_at_most_doubles_and_waits_for_those_that_start() -> None:
    pool = cluster()
    pool.run(num_samples=50 * ROOM, duration_s=600)
    assert list(dict.fromkeys(pool.counts)) == [1, 2, 4, 8]
    slow = Cluster(AutoscalingPolicy(config(), MAX_COUNT), start_s=10_000.0)
    slow.run(num_samples=50 * ROOM, duration_s=600)
    assert slow.count == 2


def test_a_queue_of_a_moment_changes_nothing() -> None:
    pool = cluster()
    for _ in range(20):
        pool.tick(3 * ROOM)
        pool.tick(ROOM)
    assert pool.count == 1


def test_requests_that_wait_in_engines_for_kv_blocks_are_pressure() -> None:
    pool = cluster(2)
    pool.run(ROOM, 30, kv_cache_usage=0.95, num_waiting_in_engines=3)
    assert pool.count == 3
    assert pool.reasons == [ScalingReason.KV_PRESSURE]
    for changes in ({"kv_cache_usage": 0.95}, {"num_waiting_in_engines": 3}):
        calm = cluster(2)
        calm.run(2 * ROOM, 600, **changes)
        assert calm.count == 2, changes


def test_idle_engines_go_one_by_one_down_to_the_minimum() -> None:
    pool = cluster(4, min_count=2)
    pool.run(num_samples=1, duration_s=110)
    assert pool.count == 4
    pool.run(num_samples=1, duration_s=1200)
    assert list(dict.fromkeys(pool.counts)) == [4, 3, 2]
    assert set(pool.reasons) == {ScalingReason.IDLE}


def test_full_kv_caches_keep_engines_that_have_room_for_samples() -> None:
    pool = cluster(2)
    pool.run(num_samples=2, duration_s=1200, kv_cache_usage=0.7)
    assert pool.count == 2


def test_a_training_step_without_rollouts_ends_no_engine() -> None:
    pool = cluster(4)
    for _ in range(10):
        pool.run(num_samples=4 * ROOM, duration_s=60)
        pool.run(num_samples=0, duration_s=100)
    assert pool.count == 4


def test_the_last_engine_goes_only_when_there_is_nothing_to_do() -> None:
    pool = cluster(1, min_count=0)
    pool.run(num_samples=1, duration_s=1200)
    assert pool.count == 1
    pool.run(num_samples=0, duration_s=1200)
    assert pool.count == 0
    pool.run(num_samples=5, duration_s=60)
    assert pool.count >= 1


def test_a_count_outside_the_limits_is_brought_back() -> None:
    pool = cluster(7, max_count=8, min_count=2)
    pool.policy = AutoscalingPolicy(config(min_count=2), 4)
    assert pool.tick(0) == ScalingDecision(count=4, reason=ScalingReason.LIMIT)


LOADS = st.lists(st.integers(0, 20 * ROOM), min_size=1, max_size=120)


@given(LOADS, st.integers(0, 3), st.integers(3, MAX_COUNT), st.integers(0, 12))
def test_whatever_the_load_the_count_stays_within_the_limits(
    loads: list[int], min_count: int, max_count: int, count: int
) -> None:
    settings = config(min_count=min_count, grow_after_s=0, shrink_after_s=0, grow_cooldown_s=0)
    pool = Cluster(AutoscalingPolicy(settings, max_count), count, start_s=0.0)
    for num_samples in loads:
        pool.tick(num_samples)
        assert min_count <= pool.count <= max_count


@given(LOADS, st.integers(1, MAX_COUNT))
def test_changes_keep_their_distance(loads: list[int], count: int) -> None:
    settings = config(grow_after_s=0, shrink_after_s=0)
    pool = Cluster(AutoscalingPolicy(settings, MAX_COUNT), count)
    changed_s: list[tuple[float, int]] = []
    for num_samples in loads:
        before = pool.count
        pool.tick(num_samples)
        if pool.count != before:
            changed_s.append((pool.time_s, pool.count - before))
    for (first_s, _), (second_s, change) in pairwise(changed_s):
        least_s = settings.grow_cooldown_s if change > 0 else settings.shrink_cooldown_s
        assert second_s - first_s >= least_s


@given(st.integers(0, 10 * ROOM), st.integers(0, 2**32), st.integers(1, MAX_COUNT))
def test_noise_around_a_steady_load_never_makes_it_go_back_and_forth(
    level: int, seed: int, count: int
) -> None:
    noise = random.Random(seed)
    pool = cluster(count)
    for _ in range(400):
        pool.tick(round(level * noise.uniform(0.8, 1.2)))
    assert pool.num_turns <= 1, pool.counts


async def test_it_is_off_unless_configured() -> None:
    engine = FakeEngine("a", state=EngineState.PAUSED)
    service = fake_service([engine, FakeEngine("b")])
    async with running(service):
        assert service.autoscaler.tick() is None
        assert service.engines().target_count == 2


async def test_a_decision_reaches_the_pool_the_log_and_the_metrics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "rollout_server.autoscaling.autoscaler")
    engine = FakeEngine("a")
    engine.unblocked.clear()
    scaling = {"enabled": True, "max_count": 3, "grow_after_s": 0, "grow_cooldown_s": 0}
    service = fake_service(
        [engine], engine={"autoscaling": scaling}, max_num_seqs=1, server={"dispatch_depth": 1}
    )
    async with running(service) as client:
        prompts = [{"prompt": letter} for letter in "abcdef"]
        asked = asyncio.create_task(client.post("/v1/rollouts", json={"prompts": prompts}))
        await until(lambda: service.engines().target_count == 2, "the pool to grow")
        text = (await client.get("/metrics")).text
        engine.unblocked.set()
        assert (await asked).status_code == 200
    assert "autoscaling pool default from 1 to 2 engines (queue): 5 samples queued" in caplog.text
    assert 'slipstream_autoscaling_changes_total{reason="queue"} 1.0' in text
