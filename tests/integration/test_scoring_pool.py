"""The scoring pool with real worker processes and rewards that misbehave in every way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from rollout_server.scoring.pool import ScoringPool
from rollout_server.scoring.types import RewardResult, ScoreJob
from shared.config.server import ScoringConfig
from shared.errors import ScoringError
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import RewardSpec
from shared.types import RewardStatus
from tests.fakes.processes import is_alive
from tests.fakes.rewards import USER_REWARDS
from tests.fakes.rollouts import rollout_sample

StartPool = Callable[..., Awaitable[ScoringPool]]


@pytest.fixture
async def start_pool() -> AsyncIterator[StartPool]:
    pools = []

    async def start(num_workers: int = 1, timeout_s: float = 60.0) -> ScoringPool:
        pool = ScoringPool(
            ScoringConfig(num_workers=num_workers, timeout_s=timeout_s, rewards=USER_REWARDS)
        )
        await pool.start()
        pools.append(pool)
        return pool

    yield start
    for pool in pools:
        await pool.close()


def make_job(name: str, params: JsonObject | None = None, completion: str = "abc") -> ScoreJob:
    return ScoreJob(
        reward=RewardSpec(name=name, params=params or {}),
        prompt="p",
        completion=completion,
        prompt_token_ids=[1],
        token_ids=[2],
        answer="7",
        metadata={"k": [1, None]},
    )


async def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of another process; bounded by the test timeout
        await asyncio.sleep(0.01)


async def test_a_user_reward_gets_the_sample_and_its_parameters(start_pool: StartPool) -> None:
    pool = await start_pool()
    result = await pool.score(make_job("length", {"factor": 0.5}, completion="\ud800ab"))
    assert (result.reward, result.status) == (1.5, RewardStatus.OK)
    assert result.detail == {"prompt": "p", "answer": "7", "metadata": {"k": [1, None]}}


@pytest.mark.parametrize("fails", [False, True])
async def test_text_that_is_no_unicode_does_not_reach_the_answer(
    start_pool: StartPool, fails: bool
) -> None:
    pool = await start_pool()
    result = await pool.score(make_job("echoes", {"fails": fails}))
    assert result.status is (RewardStatus.ERROR if fails else RewardStatus.OK)
    sample = rollout_sample(0, reward=1.0).model_copy(update={"reward_detail": result.detail})
    assert "abc?" in sample.model_dump_json()


async def test_a_builtin_reward_scores(start_pool: StartPool) -> None:
    pool = await start_pool()
    result = await pool.score(make_job("numeric_answer", completion="= 7"))
    assert result.reward == 1.0


@pytest.mark.parametrize(
    ("name", "text"), [("raises", "on purpose"), ("exits", "exit code 7"), ("segfaults", "SIGSEGV")]
)
async def test_a_failing_reward_is_an_error_and_the_next_sample_is_scored(
    start_pool: StartPool, name: str, text: str
) -> None:
    pool = await start_pool()
    result = await pool.score(make_job(name))
    assert (result.reward, result.status) == (None, RewardStatus.ERROR)
    assert text in str(result.detail["error"])
    assert (await pool.score(make_job("length"))).reward == 3.0


async def test_a_signal_without_a_name_is_told_by_its_number(start_pool: StartPool) -> None:
    pool = await start_pool()
    result = await pool.score(make_job("signals", {"number": 40}))
    assert result.detail["error"] == "the worker was ended by signal 40"
    assert (await pool.score(make_job("length"))).reward == 3.0


async def test_an_answer_that_makes_no_sense_costs_one_sample_and_no_seat(
    start_pool: StartPool,
) -> None:
    pool = await start_pool()
    with pytest.raises(ScoringError, match="internal error"):
        await pool.score(make_job("meddles"))
    assert (await pool.score(make_job("length"))).reward == 3.0


async def test_a_reward_that_hangs_is_a_timeout_and_its_worker_is_replaced(
    start_pool: StartPool,
) -> None:
    pool = await start_pool(timeout_s=2.0)
    before = (await pool.score(make_job("pid"))).reward
    result = await pool.score(make_job("hangs"))
    assert (result.reward, result.status) == (None, RewardStatus.TIMEOUT)
    assert "scoring.timeout_s 2" in str(result.detail["error"])
    after = (await pool.score(make_job("pid"))).reward
    assert before is not None
    assert before != after
    assert not is_alive(int(before))


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_timeout_ends_what_the_reward_has_started_too(
    start_pool: StartPool, tmp_path: Path, leaves: bool
) -> None:
    pool = await start_pool(timeout_s=3.0)
    path = tmp_path / "child"
    result = await pool.score(make_job("waits_with_child", {"path": str(path), "leaves": leaves}))
    assert result.status is RewardStatus.TIMEOUT
    child = int(path.read_text())
    await wait_for(lambda: not is_alive(child))


async def test_what_a_reward_prints_does_not_disturb_the_results(start_pool: StartPool) -> None:
    pool = await start_pool()
    assert (await pool.score(make_job("prints"))).reward == 1.0


async def test_a_worker_that_died_idle_costs_no_sample(start_pool: StartPool) -> None:
    pool = await start_pool()
    pid = int((await pool.score(make_job("pid"))).reward or 0)
    os.kill(pid, signal.SIGKILL)
    while is_alive(pid):  # blocking: asyncio is not to learn of the death before the pool
        time.sleep(0.01)  # noqa: ASYNC251
    result = await pool.score(make_job("pid"))
    assert result.status is RewardStatus.OK
    assert result.reward != pid


async def test_jobs_are_scored_in_the_order_they_came(
    start_pool: StartPool, tmp_path: Path
) -> None:
    pool = await start_pool()
    params: JsonObject = {"path": str(tmp_path / "order")}
    names = [str(index) for index in range(30)]
    await asyncio.gather(*(pool.score(make_job("order", params, name)) for name in names))
    assert (tmp_path / "order").read_text().split() == names


async def test_no_job_is_lost_when_good_and_bad_rewards_are_mixed(start_pool: StartPool) -> None:
    pool = await start_pool(num_workers=2)
    cycle = ["length", "raises", "exits", "length", "segfaults"]
    expected = {"length": RewardStatus.OK}
    names = cycle * 6
    results: list[RewardResult] = await asyncio.gather(
        *(pool.score(make_job(name)) for name in names)
    )
    statuses = [result.status for result in results]
    assert statuses == [expected.get(name, RewardStatus.ERROR) for name in names]


async def test_a_caller_that_gives_up_leaves_the_pool_working(
    start_pool: StartPool, tmp_path: Path
) -> None:
    pool = await start_pool(timeout_s=3.0)
    path = tmp_path / "pid"
    running = asyncio.create_task(pool.score(make_job("waits", {"path": str(path)})))
    queued = asyncio.create_task(pool.score(make_job("exits")))
    await wait_for(path.exists)
    for task in (running, queued):
        task.cancel()
    await asyncio.gather(running, queued, return_exceptions=True)
    assert (await pool.score(make_job("length"))).reward == 3.0


async def test_close_ends_the_workers_and_fails_what_waits(
    start_pool: StartPool, tmp_path: Path
) -> None:
    pool = await start_pool()
    path = tmp_path / "pid"
    running = asyncio.create_task(pool.score(make_job("waits", {"path": str(path)})))
    queued = asyncio.create_task(pool.score(make_job("length")))
    await wait_for(path.exists)
    await pool.close()
    await pool.close()
    for task in (running, queued):
        with pytest.raises(ScoringError):
            await task
    assert not is_alive(int(path.read_text()))
    with pytest.raises(ScoringError):
        await pool.score(make_job("length"))
