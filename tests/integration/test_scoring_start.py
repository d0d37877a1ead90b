"""What the scoring pool refuses: rewards it cannot import, requests that do not fit a reward."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollout_server.scoring.pool import ScoringPool
from shared.config.server import ScoringConfig
from shared.errors import ConfigurationError, InvalidRequestError, ScoringError
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import RewardSpec
from tests.fakes.processes import is_alive
from tests.fakes.rewards import USER_REWARDS


@pytest.mark.parametrize(
    ("name", "params", "param", "text"),
    [
        ("numeric_anwser", {}, "reward.name", "numeric_answer"),
        ("numeric_answer", {"tolerance": -1}, "reward.params.tolerance", "-1"),
        ("numeric_answer", {"tolerance": "x"}, "reward.params.tolerance", "'x'"),
        ("numeric_answer", {"marker": ""}, "reward.params.marker", "empty"),
        ("numeric_answer", {"mark": "="}, "reward.params.mark", "marker"),
        ("regex", {}, "reward.params.pattern", "required"),
        ("regex", {"pattern": "(a"}, "reward.params.pattern", "unterminated"),
        ("regex", {"pattern": "(?a)(?u)x"}, "reward.params.pattern", "incompatible"),
        ("format", {"tags": ["a b"]}, "reward.params.tags", "'a b'"),
        ("length_penalty", {"max_length": 0}, "reward.params.max_length", "below 1"),
        ("code_tests", {}, "reward.name", "scoring.allow_code_execution is false"),
        ("length", {"factor": "2"}, "reward.params.factor", "'2'"),
        ("order", {}, "reward.params.path", "required"),
    ],
)
async def test_a_wrong_reward_request_is_refused_by_name(
    name: str, params: JsonObject, param: str, text: str
) -> None:
    pool = ScoringPool(ScoringConfig(rewards=USER_REWARDS))
    await pool.start()
    await pool.close()
    with pytest.raises(InvalidRequestError, match=text) as caught:
        pool.validate_reward(RewardSpec(name=name, params=params))
    assert caught.value.param == param


async def test_known_rewards_are_listed_and_accepted() -> None:
    pool = ScoringPool(ScoringConfig(rewards=USER_REWARDS))
    await pool.start()
    await pool.close()
    found = set(pool.reward_names()) - {"math_verify"}  # where its package is installed
    always = {"exact_match", "format", "length_penalty", "numeric_answer", "regex"}
    assert found == {*USER_REWARDS, *always}
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


def test_code_is_executed_only_where_that_is_allowed() -> None:
    spec = RewardSpec(name="code_tests", params={"tests": ["assert True"]})
    pool = ScoringPool(ScoringConfig(allow_code_execution=True))
    pool.validate_reward(spec)
    assert "code_tests" in pool.reward_names()
    with pytest.raises(InvalidRequestError, match="-1, which is not above 0") as caught:
        pool.validate_reward(spec.model_copy(update={"params": {"timeout_s": -1}}))
    assert caught.value.param == "reward.params.timeout_s"


def test_a_reward_whose_package_is_missing_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pool = ScoringPool(ScoringConfig())
    with pytest.raises(InvalidRequestError, match=r"slipstream-rollout\[math\]") as caught:
        pool.validate_reward(RewardSpec(name="math_verify"))
    assert caught.value.param == "reward.name"
    assert "math_verify" not in pool.reward_names()


def test_a_builtin_name_cannot_be_taken() -> None:
    with pytest.raises(ConfigurationError, match="exact_match"):
        ScoringPool(ScoringConfig(rewards={"exact_match": "m:f"}))


PARENT = """
import asyncio, sys
from rollout_server.scoring.pool import ScoringPool
from rollout_server.scoring.types import ScoreJob
from shared.config.server import ScoringConfig
from shared.schemas.rollouts import RewardSpec
from tests.fakes.rewards import USER_REWARDS

async def main():
    pool = ScoringPool(ScoringConfig(timeout_s=600, rewards=USER_REWARDS))
    await pool.start()
    await pool.score(ScoreJob(
        reward=RewardSpec(name="waits", params={"path": sys.argv[1]}), prompt="", completion="",
        prompt_token_ids=[], token_ids=[], answer=None, metadata={},
    ))

asyncio.run(main())
"""


def test_a_busy_worker_dies_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(path)])
    try:
        while not path.exists():
            assert parent.poll() is None, "the parent failed to start its pool"
            time.sleep(0.02)
        worker = int(path.read_text())
        assert is_alive(worker)
    finally:
        parent.kill()
        parent.wait(timeout=30)
    while is_alive(worker):  # bounded by the test's timeout
        time.sleep(0.02)
