"""Which samples share a frame, in which order they wait, and when a worker gives some back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.scoring.frames import SLICE_S
from rollout_server.scoring.pace import MAX_BATCH_CHARS, MAX_BATCH_SAMPLES, RewardPace
from rollout_server.scoring.types import RewardResult, ScoreJob
from rollout_server.scoring.waiting import SamplesInHand, WaitingSamples
from rollout_server.scoring.worker import run_batch
from shared.errors import ScoringError
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import RewardSpec
from shared.types import RewardStatus

SPEC = RewardSpec(name="r")
METADATA: JsonObject = {"k": 1}
QUICK_S = SLICE_S / MAX_BATCH_SAMPLES


def job(completion: str, spec: RewardSpec = SPEC, metadata: JsonObject = METADATA) -> ScoreJob:
    return ScoreJob(
        reward=spec,
        prompt="p",
        completion=completion,
        prompt_token_ids=[],
        token_ids=[],
        answer=None,
        metadata=metadata,
    )


def group(name: str, num_samples: int) -> list[ScoreJob]:
    return [job(f"{name}{index}") for index in range(num_samples)]


def paced(duration_s: float) -> RewardPace:
    pace = RewardPace()
    pace.observe("r", duration_s)
    return pace


def texts(samples: SamplesInHand) -> list[str]:
    return [one.completion for one in samples.jobs]


def good(reward: float = 1.0) -> RewardResult:
    return RewardResult(reward=reward, status=RewardStatus.OK, duration_s=0.0)


def test_a_reward_that_was_never_seen_gets_a_frame_per_sample() -> None:
    pace = paced(QUICK_S)
    assert pace.num_samples("other") == 1
    assert pace.num_samples("r") == MAX_BATCH_SAMPLES


def test_one_slow_sample_is_enough_and_quick_ones_bring_it_back_step_by_step() -> None:
    pace = paced(QUICK_S)
    pace.observe("r", 1.0)
    assert pace.num_samples("r") == 1
    sizes = []
    for _ in range(20):
        pace.observe("r", QUICK_S)
        sizes.append(pace.num_samples("r"))
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert 1 < sizes[11] < MAX_BATCH_SAMPLES


@given(st.lists(st.floats(0.0, 100.0), min_size=1))
def test_a_frame_never_holds_more_than_a_slice_of_what_the_last_sample_took(
    durations_s: list[float],
) -> None:
    pace = RewardPace()
    for duration_s in durations_s:
        pace.observe("r", duration_s)
    size = pace.num_samples("r")
    assert 1 <= size <= MAX_BATCH_SAMPLES
    assert size == 1 or size * durations_s[-1] <= SLICE_S * 1.000001


async def test_a_group_goes_out_whole_if_its_reward_is_quick_else_sample_by_sample() -> None:
    for duration_s, sizes in ((QUICK_S, [3]), (SLICE_S, [1, 1, 1])):
        waiting = WaitingSamples(paced(duration_s))
        waiting.add(group("a", 3))
        assert [len((await waiting.take()).jobs) for _ in sizes] == sizes
        assert waiting.num_samples == 0


@pytest.mark.parametrize(
    ("second", "size"),
    [
        (job("y"), 2),
        (job("y", metadata=dict(METADATA)), 1),
        (job("y", spec=RewardSpec(name="r")), 1),
        (job("y" * (MAX_BATCH_CHARS - 1)), 2),
        (job("y" * MAX_BATCH_CHARS), 1),
    ],
    ids=["same", "metadata", "reward", "as long as it gets", "too long"],
)
async def test_only_what_shares_its_question_and_fits_shares_a_frame(
    second: ScoreJob, size: int
) -> None:
    waiting = WaitingSamples(paced(QUICK_S))
    waiting.add([job("x"), second])
    assert len((await waiting.take()).jobs) == size


async def test_a_sample_that_is_too_long_goes_alone() -> None:
    waiting = WaitingSamples(paced(QUICK_S))
    waiting.add([job("x" * (2 * MAX_BATCH_CHARS)), job("y")])
    assert len((await waiting.take()).jobs) == 1


async def test_what_a_worker_gives_back_comes_before_younger_groups() -> None:
    waiting = WaitingSamples(paced(QUICK_S))
    old = waiting.add(group("old", 3))
    young = waiting.add(group("young", 1))
    samples = await waiting.take()
    samples.settle_next(good())
    waiting.put(samples.rest)
    assert waiting.num_samples == 3
    for expected in (["old1", "old2"], ["young0"]):
        samples = await waiting.take()
        assert texts(samples) == expected
        for number, _ in enumerate(expected, start=2):
            samples.settle_next(good(number))
    outcomes = [outcome for outcome in old.outcomes.result() if isinstance(outcome, RewardResult)]
    assert [outcome.reward for outcome in outcomes] == [1, 2, 3]
    assert young.outcomes.done()


async def test_samples_of_a_group_whose_caller_gave_up_are_never_taken() -> None:
    waiting = WaitingSamples(paced(QUICK_S))
    gone = waiting.add(group("gone", 4))
    samples = await waiting.take()
    samples.settle_next(good())
    waiting.add(group("here", 1))
    second = waiting.add(group("gone too", 2))
    gone.outcomes.cancel()
    second.outcomes.cancel()
    waiting.put(samples.rest)
    assert texts(await waiting.take()) == ["here0"]
    taken = asyncio.create_task(waiting.take())
    await asyncio.sleep(0)
    assert not taken.done()
    assert waiting.num_samples == 0
    taken.cancel()


async def test_the_end_of_the_pool_reaches_every_sample_without_an_outcome() -> None:
    waiting = WaitingSamples(paced(SLICE_S))
    one = waiting.add(group("a", 3))
    samples = await waiting.take()
    samples.settle_next(good())
    waiting.fail_all(ScoringError("closed"))
    kinds = [type(outcome) for outcome in one.outcomes.result()]
    assert kinds == [RewardResult, ScoringError, ScoringError]
    assert waiting.num_samples == 0


def test_a_second_outcome_of_a_sample_is_a_bug() -> None:
    async def settle_twice() -> None:
        waiting = WaitingSamples(paced(QUICK_S))
        one = waiting.add(group("a", 2))
        one.settle(0, good())
        one.settle(0, good())

    with pytest.raises(AssertionError, match="twice"):
        asyncio.run(settle_twice())


def ticks(durations_s: list[float]) -> Iterator[float]:
    """What a clock shows that is read at the start, and before and after each sample."""
    now_s = 0.0
    yield now_s
    for duration_s in durations_s:
        yield now_s
        now_s += duration_s
        yield now_s


def answers(
    durations_s: list[float], reward: Any = lambda *_: 1.0, metadata: JsonObject = METADATA
) -> list[dict[str, Any]]:
    batch = {
        "name": "r",
        "prompt": "p",
        "answer": None,
        "question": json.dumps({"params": {}, "metadata": metadata}),
        "completions": [str(index) for index in range(len(durations_s))],
    }
    clock = ticks(durations_s)
    return list(run_batch({"r": reward}, batch, clock=lambda: next(clock)))


def test_every_sample_of_a_batch_is_answered_in_order_with_what_it_took() -> None:
    found = answers([0.001, 0.002, 0.001], lambda prompt, completion, *_: float(completion))
    assert [answer["reward"] for answer in found] == [0.0, 1.0, 2.0]
    assert [answer["duration_s"] for answer in found] == pytest.approx([0.001, 0.002, 0.001])
    assert [answer["last"] for answer in found] == [False, False, True]


@pytest.mark.parametrize(
    ("durations_s", "num_answers"),
    [([SLICE_S, 0.0], 1), ([0.0, 9.0, 0.0], 2), ([SLICE_S / 2] * 4, 2), ([9.0], 1)],
)
def test_a_worker_gives_back_what_it_has_not_begun_when_its_slice_is_used_up(
    durations_s: list[float], num_answers: int
) -> None:
    found = answers(durations_s)
    assert [answer["last"] for answer in found] == [False] * (num_answers - 1) + [True]


def test_a_reward_that_changes_its_metadata_changes_them_for_its_sample_only() -> None:
    found = answers([0.0] * 3, lambda p, c, a, metadata: metadata.pop("k"))
    assert [answer.get("reward") for answer in found] == [1.0, 1.0, 1.0]


def test_a_reward_that_raises_costs_the_samples_beside_it_nothing() -> None:
    def reward(prompt: str, completion: str, *_: object) -> float:
        return 1 / (int(completion) - 1)

    found = answers([0.0] * 3, reward)
    assert ["error" in answer for answer in found] == [False, True, False]


def test_cpu_time_is_given_before_every_sample() -> None:
    begun: list[str] = []
    batch = {
        "name": "r",
        "prompt": "",
        "answer": None,
        "question": '{"params": {}, "metadata": {}}',
        "completions": ["a", "b"],
    }

    def reward(prompt: str, completion: str, *_: object) -> float:
        begun.append(completion)
        return 0.0

    list(run_batch({"r": reward}, batch, lambda: begun.append("start"), lambda: 0.0))
    assert begun == ["start", "a", "start", "b"]
