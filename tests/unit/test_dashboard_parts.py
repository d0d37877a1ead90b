"""What the dashboard's feed remembers: points of engines, groups, rewards, listeners."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from rollout_server.dashboard import recent_groups
from rollout_server.dashboard.engine_track import MAX_POINTS, EngineTrack
from rollout_server.dashboard.engine_watch import EngineWatch
from rollout_server.dashboard.listeners import MAX_QUEUED_EVENTS, Listeners
from rollout_server.dashboard.recent_groups import RecentGroups, token_texts
from shared.errors import OverloadedError, UnavailableError, UnknownResourceError
from shared.schemas.engines import EngineStatus
from shared.schemas.rollouts import RolloutGroup, RolloutSample, SampleTimings, WeightVersionSpan
from shared.schemas.speculation import SpeculationStep
from shared.types import EngineState, FinishReason, RewardStatus, SpeculationReason
from tests.fakes.engine import FakeEngine


async def status(**changes: object) -> EngineStatus:
    return (await FakeEngine("a").status()).model_copy(update=changes)


def decision(step: int, time_s: float, usage: float = 0.5, length: int = 0) -> SpeculationStep:
    return SpeculationStep(
        step=step,
        time_s=time_s,
        kv_cache_usage=usage,
        num_running_reqs=1,
        num_waiting_reqs=0,
        num_speculative_tokens=length,
        reason=SpeculationReason.BELOW_THRESHOLD,
    )


def group(
    rewards: list[float | None], *, version: int = 0, num_tokens: int = 3, text: str = "abc"
) -> RolloutGroup:
    samples = [
        RolloutSample(
            sample_index=index,
            token_ids=[97] * num_tokens,
            logprobs=[-0.5] * num_tokens,
            text=text,
            finish_reason=FinishReason.STOP,
            reward=reward,
            reward_status=RewardStatus.SKIPPED if reward is None else RewardStatus.OK,
            weight_versions=[WeightVersionSpan(version=version, start=0, end=num_tokens)],
            policy_lag=0,
            engine_id="engine-0",
            num_draft_tokens=4,
            num_accepted_tokens=3,
            timings=SampleTimings(queue_s=0, generate_s=0, score_s=0),
        )
        for index, reward in enumerate(rewards)
    ]
    return RolloutGroup(
        group_id="r/group=0",
        prompt_index=0,
        prompt_token_ids=[98],
        answer="7",
        metadata={"big": "x" * 100},
        samples=samples,
    )


def decode(token_ids: object) -> str:
    assert isinstance(token_ids, list)
    return bytes(token_ids).decode(errors="replace")


async def test_an_engines_points_are_its_decisions_and_between_them_its_status() -> None:
    track = EngineTrack()
    idle = await status(num_running_reqs=0)
    assert track.tick(10.0, idle, draft_length=4) == [(10.0, 0.25, 0)]
    steps = [
        decision(1, 9.0),
        decision(2, 10.5, usage=0.6),
        decision(3, 10.6, usage=0.7),
        decision(4, 10.7, usage=0.4, length=3),
    ]
    track.add_decisions(steps)
    # One is older than what is known, one follows too closely; a switch is always kept.
    assert track.tick(11.0, idle, 0) == [(10.5, 0.6, 0), (10.7, 0.4, 3)]
    assert track.last_step == 4
    busy = await status(num_running_reqs=2)
    assert track.tick(12.0, busy, draft_length=4) == [(12.0, 0.25, 4)]
    for second in range(2 * MAX_POINTS):
        track.tick(20.0 + second, idle, 0)
    assert len(track.points) == MAX_POINTS
    assert all(before[0] < after[0] for before, after in pairwise(track.points))


async def test_throughput_is_measured_over_the_engines_own_clock() -> None:
    track = EngineTrack()
    track.tick(0.0, await status(uptime_s=5.0, num_generation_tokens=100), 0)
    assert track.tokens_per_s == 0.0
    track.tick(1.0, await status(uptime_s=5.5, num_generation_tokens=150), 0)
    assert track.tokens_per_s == 100.0
    # No news from the engine: what was measured stands.
    track.tick(2.0, await status(uptime_s=5.5, num_generation_tokens=150), 0)
    assert track.tokens_per_s == 100.0
    track.tick(3.0, await status(uptime_s=6.5, num_generation_tokens=0), 0)
    assert track.tokens_per_s == 0.0


def test_an_engine_that_is_gone_is_reported_once_with_its_reason() -> None:
    watch = EngineWatch()
    killed, drained = FakeEngine("killed"), FakeEngine("drained")
    assert watch.look_for_departed(1.0, [killed, drained]) == []
    drained.state = EngineState.DRAINING
    killed.die("its process ended")
    assert watch.look_for_departed(2.0, [killed, drained]) == []
    drained.die("drained")
    gone = watch.look_for_departed(3.0, [])
    assert [(engine.engine_id, engine.last_state, engine.reason) for engine in gone] == [
        ("killed", EngineState.SERVING, "its process ended"),
        ("drained", EngineState.DRAINING, "drained"),
    ]
    assert watch.look_for_departed(4.0, []) == []
    assert watch.departed == gone


def test_rewards_are_counted_by_version_with_greedy_samples_apart() -> None:
    groups = RecentGroups()
    groups.observe(1.0, group([0.0, 1.0, None], version=3), is_greedy=False)
    groups.observe(1.0, group([0.5], version=3), is_greedy=False)
    groups.observe(1.0, group([1.0], version=3), is_greedy=True)
    assert groups.take_rewards_changed()
    assert not groups.take_rewards_changed()
    sampled, greedy = groups.rewards()
    assert (sampled.num_samples, sampled.mean_reward, sampled.num_at_least_one) == (3, 0.5, 1)
    assert (greedy.is_greedy, greedy.mean_reward) == (True, 1.0)
    for version in range(2 * recent_groups.MAX_VERSIONS):
        groups.observe(1.0, group([1.0], version=version), is_greedy=False)
    kept = groups.rewards()
    assert len(kept) == recent_groups.MAX_VERSIONS
    assert kept[-1].version == 2 * recent_groups.MAX_VERSIONS - 1


def test_thousands_of_groups_leave_the_latest_few_and_bounded_text() -> None:
    groups = RecentGroups()
    for _ in range(5000):
        groups.observe(1.0, group([1.0] * 20, text="y" * 1000), is_greedy=False)
    new = groups.tick()
    assert len(new) == recent_groups.MAX_GROUPS_PER_TICK
    assert len(new[-1].samples) == recent_groups.MAX_SAMPLES_PER_GROUP
    assert new[-1].num_samples == 20
    assert len(new[-1].samples[0].preview) == recent_groups.PREVIEW_CHARACTERS
    assert groups.tick() == []
    for _ in range(20):
        groups.observe(1.0, group([1.0]), is_greedy=False)
        groups.tick()
    assert len(groups.groups) <= recent_groups.MAX_GROUPS


def test_kept_tokens_are_bounded_and_a_dropped_group_says_so() -> None:
    groups = RecentGroups()
    for _ in range(30):
        groups.observe(1.0, group([1.0] * 8, num_tokens=4096), is_greedy=False)
        groups.tick()
    tokens_of_one = 8 * recent_groups.MAX_TOKENS_PER_SAMPLE
    assert len(groups.groups) == recent_groups.MAX_KEPT_TOKENS // tokens_of_one
    latest = groups.tokens(30, decode)
    assert len(latest.samples[0].texts) == recent_groups.MAX_TOKENS_PER_SAMPLE
    assert latest.samples[0].num_tokens == 4096
    assert latest.prompt == "b"
    with pytest.raises(UnknownResourceError, match="group 1 is not kept"):
        groups.tokens(1, decode)


def test_texts_of_tokens_join_to_the_whole_and_half_characters_wait() -> None:
    token_ids = list("aé€b".encode())
    assert token_texts(token_ids, decode) == ["a", "", "é", "", "", "€", "b"]
    assert "".join(token_texts(token_ids[:-2], decode)) == "aé�"
    assert token_texts([], decode) == []


async def test_a_listener_that_does_not_keep_up_is_let_go_with_the_latest_events() -> None:
    listeners = Listeners(max_listeners=2)
    slow, quick = listeners.add(b"first"), listeners.add(b"first")
    received = []

    async def follow() -> None:
        async for event in quick.events():
            received.append(event)

    following = asyncio.create_task(follow())
    for index in range(MAX_QUEUED_EVENTS + 1):
        await asyncio.sleep(0)
        listeners.send(b"%d" % index, farewell=b"too slow")
    assert len(listeners) == 1
    assert [event async for event in slow.events()][-1] == b"too slow"
    listeners.close(b"bye")
    await asyncio.wait_for(following, 10)
    assert received[0] == b"first"
    assert received[-1] == b"bye"
    with pytest.raises(UnavailableError, match="shutting down"):
        listeners.check_room()


def test_a_listener_too_many_is_refused_by_the_name_of_the_setting() -> None:
    listeners = Listeners(max_listeners=1)
    listeners.check_room()
    listener = listeners.add(b"")
    with pytest.raises(OverloadedError, match=r"server\.dashboard\.max_listeners 1"):
        listeners.check_room()
    listeners.remove(listener)
    listeners.check_room()
