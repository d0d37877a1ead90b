"""Groups in real worker processes: batches, and what one bad sample costs the others in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from rollout_server.scoring.pool import ScoringPool
from rollout_server.scoring.types import RewardResult, ScoreJob, ScoreOutcome
from rollout_server.scoring.worker_seat import WorkerSeat
from shared.clock import SystemClock
from shared.config.server import ScoringConfig
from shared.errors import ScoringError
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import RewardSpec
from shared.types import RewardStatus
from tests.fakes.rewards import USER_REWARDS

StartPool = Callable[..., Awaitable[ScoringPool]]
OK, ERROR, TIMEOUT = RewardStatus.OK, RewardStatus.ERROR, RewardStatus.TIMEOUT


@pytest.fixture
async def start_pool() -> AsyncIterator[StartPool]:
    pools = []

    async def start(num_workers: int = 1, timeout_s: float = 60.0) -> ScoringPool:
        pool = ScoringPool(config(num_workers, timeout_s))
        await pool.start()
        pools.append(pool)
        return pool

    yield start
    for pool in pools:
        await pool.close()


def config(num_workers: int = 1, timeout_s: float = 60.0) -> ScoringConfig:
    return ScoringConfig(num_workers=num_workers, timeout_s=timeout_s, rewards=USER_REWARDS)


def make_group(name: str, params: JsonObject, completions: Sequence[str]) -> list[ScoreJob]:
    """Samples that share their question."""
    spec = RewardSpec(name=name, params=params)
    metadata: JsonObject = {"k": [1, None]}
    return [
        ScoreJob(
            reward=spec,
            prompt="p",
            completion=completion,
            prompt_token_ids=[1],
            token_ids=[2],
            answer="7",
            metadata=metadata,
        )
        for completion in completions
    ]


def results_of(outcomes: Sequence[ScoreOutcome]) -> list[RewardResult]:
    assert not any(isinstance(outcome, ScoringError) for outcome in outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, RewardResult)]


async def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of another process; bounded by the test timeout
        await asyncio.sleep(0.01)


async def warm_up(pool: ScoringPool, path: Path) -> None:
    """Let the pool see that ``obeys`` is quick, so that its samples share frames."""
    jobs = make_group("obeys", {"path": f"{path}-warm-up"}, ["ok"] * 20)
    assert {result.status for result in results_of(await pool.score_group(jobs))} == {OK}


async def test_a_group_has_its_results_in_the_order_of_its_samples(start_pool: StartPool) -> None:
    pool = await start_pool(num_workers=2)
    texts = ["a" * (index * 37 % 50) + "\ud800" for index in range(100)]
    jobs = make_group("length", {"factor": 2.0}, texts)
    for result, text in zip(results_of(await pool.score_group(jobs)), texts, strict=True):
        assert (result.reward, result.status) == (2.0 * len(text), OK)
        assert result.detail == {"prompt": "p", "answer": "7", "metadata": {"k": [1, None]}}
    assert await pool.score_group([]) == []


async def test_quick_samples_share_frames_and_none_is_judged_twice(tmp_path: Path) -> None:
    seat = WorkerSeat(config(), SystemClock())
    await seat.start()
    path = tmp_path / "seen"
    texts = [f"ok {index}" for index in range(64)]
    left = make_group("obeys", {"path": str(path)}, texts)
    results: list[RewardResult] = []
    num_frames = 0
    try:
        while left:
            before = len(results)
            await seat.run(left, results.append)
            num_frames += 1
            assert len(results) > before
            left = left[len(results) - before :]
    finally:
        await seat.close()
    assert [result.reward for result in results] == [len(text) for text in texts]
    assert path.read_text().splitlines() == texts
    assert num_frames < len(texts)


@pytest.mark.parametrize(
    ("command", "status", "text", "num_lost"),
    [
        ("hang", TIMEOUT, "scoring.timeout_s 3", 1),
        ("exit", ERROR, "exit code 7", 1),
        ("raise", ERROR, "on purpose", 0),
    ],
)
async def test_a_bad_sample_costs_those_beside_it_nothing_and_none_is_judged_twice(
    start_pool: StartPool,
    tmp_path: Path,
    command: str,
    status: RewardStatus,
    text: str,
    num_lost: int,
) -> None:
    pool = await start_pool(timeout_s=3.0)
    path = tmp_path / "seen"
    await warm_up(pool, path)
    texts = ["ok 0", "ok 1", f"{command} 2", "ok 3", "ok 4", "ok 5"]
    jobs = make_group("obeys", {"path": str(path)}, texts)
    results = results_of(await pool.score_group(jobs))
    assert [result.status for result in results] == [OK, OK, status, OK, OK, OK]
    assert text in str(results[2].detail["error"])
    assert path.read_text().splitlines() == texts
    assert pool.num_worker_restarts == num_lost


async def test_bad_samples_in_every_place_are_each_one_status(
    start_pool: StartPool, tmp_path: Path
) -> None:
    pool = await start_pool(num_workers=2)
    path = tmp_path / "seen"
    await warm_up(pool, path)
    commands = ["exit", "ok", "raise", "exit", "exit", "ok", "ok", "exit"]
    texts = [f"{command} {index}" for index, command in enumerate(commands * 3)]
    groups = [texts[start : start + 8] for start in range(0, 24, 8)]
    outcomes = await asyncio.gather(
        *(pool.score_group(make_group("obeys", {"path": str(path)}, part)) for part in groups)
    )
    for part, group_outcomes in zip(groups, outcomes, strict=True):
        for one, result in zip(part, results_of(group_outcomes), strict=True):
            assert result.status is (OK if one.startswith("ok") else ERROR)
    assert sorted(path.read_text().splitlines()) == sorted(texts)
    assert pool.num_worker_restarts == commands.count("exit") * 3


async def test_slow_samples_of_one_group_are_spread_over_the_workers(
    start_pool: StartPool, tmp_path: Path
) -> None:
    """They wait for each other, so that one worker alone would never be done."""
    pool = await start_pool(num_workers=2)
    (tmp_path / "alone").mkdir()
    (tmp_path / "together").mkdir()
    alone = make_group("meets", {"path": str(tmp_path / "alone"), "num_workers": 1}, ["x"])
    assert results_of(await pool.score_group(alone))[0].status is OK
    params: JsonObject = {"path": str(tmp_path / "together"), "num_workers": 2}
    results = results_of(await pool.score_group(make_group("meets", params, ["x"] * 6)))
    assert {result.status for result in results} == {OK}
    assert len({result.reward for result in results}) == 2


async def test_a_group_whose_caller_gives_up_costs_nothing_more_than_what_is_in_hand(
    start_pool: StartPool, tmp_path: Path
) -> None:
    pool = await start_pool(timeout_s=3.0)
    path = tmp_path / "seen"
    await warm_up(pool, path)
    texts = ["ok 0", "hang 1", "ok 2", "ok 3"]
    given_up = asyncio.create_task(
        pool.score_group(make_group("obeys", {"path": str(path)}, texts))
    )
    await wait_for(lambda: path.exists() and "hang" in path.read_text())
    given_up.cancel()
    other = make_group("obeys", {"path": str(path)}, ["ok 4"])
    assert results_of(await pool.score_group(other))[0].status is OK
    assert path.read_text().splitlines() == ["ok 0", "hang 1", "ok 4"]
    assert pool.num_queued == 0


async def test_closing_the_pool_leaves_the_results_that_are_there(
    start_pool: StartPool, tmp_path: Path
) -> None:
    pool = await start_pool()
    path = tmp_path / "seen"
    await warm_up(pool, path)
    texts = ["ok 0", "hang 1", "ok 2"]
    scored = asyncio.create_task(pool.score_group(make_group("obeys", {"path": str(path)}, texts)))
    await wait_for(lambda: path.exists() and "hang" in path.read_text())
    await pool.close()
    kinds = [type(outcome) for outcome in await scored]
    assert kinds == [RewardResult, ScoringError, ScoringError]
    assert path.read_text().splitlines() == texts[:2]
    after = await pool.score_group(make_group("length", {}, ["a", "b"]))
    assert [type(outcome) for outcome in after] == [ScoringError, ScoringError]


async def test_what_a_group_shares_and_has_no_json_form_is_an_error_of_each_sample(
    start_pool: StartPool,
) -> None:
    pool = await start_pool()
    results = results_of(
        await pool.score_group(make_group("length", {"factor": float("nan")}, ["a", "b"]))
    )
    assert [result.status for result in results] == [ERROR, ERROR]
    assert "no JSON form" in str(results[1].detail["error"])
    assert results_of(await pool.score_group(make_group("length", {}, ["abc"])))[0].reward == 3.0
