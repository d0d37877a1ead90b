"""The scoring pool with real worker processes and rewards that misbehave in every way."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from rollout_server.scoring.pool import ScoringPool
from rollout_server.scoring.types import RewardResult, ScoreJob
from shared.config.server import ScoringConfig
from shared.errors import ConfigurationError, InvalidRequestError, ScoringError
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import RewardSpec
from shared.types import RewardStatus

USER_REWARDS = """
import os, signal, subprocess, sys, time

def length(prompt, completion, answer, metadata, factor: float = 1.0):
    return factor * len(completion), {"prompt": prompt, "answer": answer, "metadata": metadata}

def raises(prompt, completion, answer, metadata):
    raise RuntimeError("on purpose")

def hangs(prompt, completion, answer, metadata):
    while True:
        pass

def sleeps_with_child(prompt, completion, answer, metadata, path: str):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(path, "w") as file:
        file.write(str(child.pid))
    time.sleep(600)

def exits(prompt, completion, answer, metadata):
    os._exit(7)

def segfaults(prompt, completion, answer, metadata):
    os.kill(os.getpid(), signal.SIGSEGV)

def prints(prompt, completion, answer, metadata):
    print("x" * 100_000)
    sys.stdout.flush()
    return float(sys.stdin.read() == "")

def pid(prompt, completion, answer, metadata):
    return os.getpid()

def order(prompt, completion, answer, metadata, path: str):
    with open(path, "a") as file:
        file.write(completion + " ")
    return 0.0

def waits(prompt, completion, answer, metadata, path: str):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
"""
NAMES = (
    "length", "raises", "hangs", "sleeps_with_child", "exits", "segfaults", "prints", "pid",
    "order", "waits",
)  # fmt: skip

StartPool = Callable[..., Awaitable[ScoringPool]]


@pytest.fixture
async def start_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartPool]:
    (tmp_path / "slipstream_test_rewards.py").write_text(USER_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    pools = []

    async def start(num_workers: int = 1, timeout_s: float = 60.0) -> ScoringPool:
        rewards = {name: f"slipstream_test_rewards:{name}" for name in NAMES}
        pool = ScoringPool(
            ScoringConfig(num_workers=num_workers, timeout_s=timeout_s, rewards=rewards)
        )
        await pool.start()
        pools.append(pool)
        return pool

    yield start
    for pool in pools:
        await pool.close()


def make_job(
    name: str, params: JsonObject | None = None, completion: str = "abc", **fields: object
) -> ScoreJob:
    return ScoreJob(
        reward=RewardSpec(name=name, params=params or {}),
        prompt="p",
        completion=completion,
        prompt_token_ids=[1],
        token_ids=[2],
        answer="7",
        metadata={"k": [1, None]},
    )


def is_alive(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return fields.rpartition(")")[2].split()[0] != "Z"


async def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of another process; bounded by the test timeout
        await asyncio.sleep(0.01)


async def test_a_user_reward_gets_the_sample_and_its_parameters(start_pool: StartPool) -> None:
    pool = await start_pool()
    result = await pool.score(make_job("length", {"factor": 0.5}, completion="\ud800ab"))
    assert (result.reward, result.status) == (1.5, RewardStatus.OK)
    assert result.detail == {"prompt": "p", "answer": "7", "metadata": {"k": [1, None]}}


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


async def test_a_reward_that_hangs_is_a_timeout_and_its_worker_is_replaced(
    start_pool: StartPool,
) -> None:
    pool = await start_pool(timeout_s=1.0)
    before = (await pool.score(make_job("pid"))).reward
    result = await pool.score(make_job("hangs"))
    assert (result.reward, result.status) == (None, RewardStatus.TIMEOUT)
    assert "scoring.timeout_s 1" in str(result.detail["error"])
    after = (await pool.score(make_job("pid"))).reward
    assert before is not None
    assert before != after
    assert not is_alive(int(before))


async def test_a_timeout_ends_what_the_reward_has_started_too(
    start_pool: StartPool, tmp_path: Path
) -> None:
    pool = await start_pool(timeout_s=2.0)
    path = tmp_path / "child"
    result = await pool.score(make_job("sleeps_with_child", {"path": str(path)}))
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
    pool = await start_pool(timeout_s=2.0)
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
    await wait_for(lambda: path.exists() and path.read_text() != "")
    await pool.close()
    await pool.close()
    for task in (running, queued):
        with pytest.raises(ScoringError):
            await task
    assert not is_alive(int(path.read_text()))
    with pytest.raises(ScoringError):
        await pool.score(make_job("length"))


@pytest.mark.parametrize(
    ("name", "params", "param", "text"),
    [
        ("numeric_anwser", {}, "reward.name", "numeric_answer"),
        ("numeric_answer", {"tolerance": -1}, "reward.params.tolerance", "-1"),
        ("numeric_answer", {"tolerance": "x"}, "reward.params.tolerance", "'x'"),
        ("numeric_answer", {"marker": ""}, "reward.params.marker", "empty"),
        ("numeric_answer", {"mark": "="}, "reward.params.mark", "marker"),
        ("length", {"factor": "2"}, "reward.params.factor", "'2'"),
        ("order", {}, "reward.params.path", "required"),
    ],
)
async def test_a_wrong_reward_request_is_refused_by_name(
    start_pool: StartPool, name: str, params: JsonObject, param: str, text: str
) -> None:
    pool = await start_pool()
    with pytest.raises(InvalidRequestError, match=text) as caught:
        pool.validate_reward(RewardSpec(name=name, params=params))
    assert caught.value.param == param


async def test_known_rewards_are_listed_and_accepted(start_pool: StartPool) -> None:
    pool = await start_pool()
    assert pool.reward_names() == sorted([*NAMES, "exact_match", "numeric_answer"])
    pool.validate_reward(RewardSpec(name="length", params={"factor": 2}))
    pool.validate_reward(RewardSpec(name="exact_match"))


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ("", "no_such_module_of_rewards:f", "no_such_module_of_rewards"),
        ("", "broken_rewards:f", "no attribute 'f'"),
        ("import sys; sys.exit(4)", "broken_rewards:f", "SystemExit"),
        ("import os; os._exit(4)", "broken_rewards:f", "exit code 4"),
        ("def f(completion): return 1", "broken_rewards:f", "too many positional"),
        ("", "broken_rewards", "module:function"),
    ],
)
async def test_a_reward_that_cannot_be_imported_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, text: str
) -> None:
    (tmp_path / "broken_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ScoringPool(ScoringConfig(num_workers=2, rewards={"mine": target}))
    with pytest.raises((ConfigurationError, ScoringError), match=text):
        await pool.start()


def test_a_builtin_name_cannot_be_taken() -> None:
    with pytest.raises(ConfigurationError, match="exact_match"):
        ScoringPool(ScoringConfig(rewards={"exact_match": "m:f"}))


PARENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from tests_parent import main
asyncio.run(main(sys.argv[2]))
"""
PARENT_MODULE = """
import asyncio
from rollout_server.scoring.pool import ScoringPool
from rollout_server.scoring.types import ScoreJob
from shared.config.server import ScoringConfig
from shared.schemas.rollouts import RewardSpec

async def main(path):
    pool = ScoringPool(
        ScoringConfig(timeout_s=600, rewards={"waits": "slipstream_test_rewards:waits"})
    )
    await pool.start()
    await pool.score(ScoreJob(
        reward=RewardSpec(name="waits", params={"path": path}), prompt="", completion="",
        prompt_token_ids=[], token_ids=[], answer=None, metadata={},
    ))
"""


def test_a_busy_worker_dies_with_the_server(tmp_path: Path) -> None:
    (tmp_path / "slipstream_test_rewards.py").write_text(USER_REWARDS)
    (tmp_path / "tests_parent.py").write_text(PARENT_MODULE)
    path = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), str(path)])
    try:
        while not path.exists() or not path.read_text():
            assert parent.poll() is None, "the parent failed to start its pool"
            time.sleep(0.02)
        worker = int(path.read_text())
        assert is_alive(worker)
    finally:
        parent.kill()
        parent.wait(timeout=30)
    while is_alive(worker):  # bounded by the test's timeout
        time.sleep(0.02)
