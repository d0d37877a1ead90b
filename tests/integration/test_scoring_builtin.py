"""The built-in rewards in real workers: limits are statuses, and confined workers run them too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from rollout_server.scoring.pool import ScoringPool
from rollout_server.scoring.types import RewardResult, ScoreJob
from shared.config.server import ScoringConfig
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import RewardSpec
from shared.types import RewardStatus

Score = Callable[..., Awaitable[RewardResult]]
StartPool = Callable[..., Awaitable[Score]]
CODE = "```python\ndef double(x):\n    return 2 * x\n```"
LOOP = "```python\ndef double(x):\n    while True:\n        pass\n```"


@pytest.fixture
async def start_pool() -> AsyncIterator[StartPool]:
    pools = []

    async def start(**settings: object) -> Score:
        pool = ScoringPool(ScoringConfig.model_validate(settings))
        await pool.start()
        pools.append(pool)

        async def score(name: str, completion: str, **params: object) -> RewardResult:
            known: JsonObject = dict(params)  # type: ignore[arg-type]
            spec = RewardSpec(name=name, params=known)
            pool.validate_reward(spec)
            return await pool.score(
                ScoreJob(
                    reward=spec,
                    prompt="Q",
                    completion=completion,
                    prompt_token_ids=[1],
                    token_ids=[2],
                    answer="7",
                    metadata={},
                )
            )

        return score

    yield start
    for pool in pools:
        await pool.close()


async def test_a_pattern_that_backtracks_without_end_is_a_timeout_of_its_sample(
    start_pool: StartPool,
) -> None:
    score = await start_pool(timeout_s=2.0)
    result = await score("regex", "a" * 64, pattern="(a+)+b")
    assert (result.reward, result.status) == (None, RewardStatus.TIMEOUT)
    assert (await score("regex", "aab", pattern="(a+)+b")).reward == 1.0


async def test_every_reward_of_text_scores(start_pool: StartPool) -> None:
    score = await start_pool()
    tagged = "<think>3 + 4</think><answer>7</answer>"
    for name, completion, params, reward in (
        ("regex", "so 7", {"pattern": "[0-9]"}, 1.0),
        ("format", tagged, {}, 1.0),
        ("length_penalty", "a" * 90, {"max_length": 100}, -0.5),
        ("exact_match", " 7", {}, 1.0),
        ("numeric_answer", "= 7.0", {}, 1.0),
    ):
        assert (await score(name, completion, **params)).reward == reward, name


async def test_code_is_tested_in_a_confined_worker_too_and_a_loop_is_a_wrong_answer(
    start_pool: StartPool,
) -> None:
    score = await start_pool(
        allow_code_execution=True, network="deny", max_memory_mib=1024, max_cpu_s=10, timeout_s=60
    )
    tests = ["assert double(2) == 4", "assert double('a') == 'aa'"]
    assert (await score("code_tests", CODE, tests=tests)).reward == 1.0
    looped = await score("code_tests", LOOP, tests=[*tests, "double(1)"], partial=True, timeout_s=4)
    assert (looped.status, looped.reward) == (RewardStatus.OK, 0.0)
    assert looped.detail["num_tests"] == 3
    assert (await score("code_tests", CODE, tests=["assert double('b') == 'bb'"])).reward == 1.0


async def test_code_that_outlives_the_time_of_its_sample_is_a_timeout(
    start_pool: StartPool,
) -> None:
    score = await start_pool(allow_code_execution=True, timeout_s=2.0)
    result = await score("code_tests", LOOP, tests=["double(1)"], test_timeout_s=60, timeout_s=60)
    assert result.status is RewardStatus.TIMEOUT
    assert (await score("exact_match", "7")).reward == 1.0
