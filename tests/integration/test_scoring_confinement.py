"""What rewards cannot do in a confined worker: sockets, memory, CPU time, keys."""

from __future__ import annotations

import platform
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from rollout_server.scoring import confinement
from rollout_server.scoring.confinement import WorkerLimits, deny_sockets
from rollout_server.scoring.pool import ScoringPool
from rollout_server.scoring.types import RewardResult
from shared.config.server import ScoringConfig
from shared.errors import ConfigurationError
from shared.schemas.base import JsonObject
from shared.types import RewardStatus
from tests.fakes.rewards import USER_REWARDS
from tests.integration.test_scoring_pool import make_job

Score = Callable[..., Awaitable[RewardResult]]
StartPool = Callable[..., Awaitable[Score]]


@pytest.fixture
async def start_pool() -> AsyncIterator[StartPool]:
    pools = []

    async def start(**settings: object) -> Score:
        config = {"timeout_s": 60.0, "rewards": USER_REWARDS, **settings}
        pool = ScoringPool(ScoringConfig.model_validate(config))
        await pool.start()
        pools.append(pool)

        async def score(name: str, **params: object) -> RewardResult:
            known: JsonObject = dict(params)  # type: ignore[arg-type]
            return await pool.score(make_job(name, known))

        return score

    yield start
    for pool in pools:
        await pool.close()


async def test_a_worker_without_limits_may_do_all_of_it(start_pool: StartPool) -> None:
    score = await start_pool()
    for name, params in (
        ("connects", {}),
        ("connects_in_child", {}),
        ("pairs", {}),
        ("allocates", {"mib": 600}),
    ):
        assert (await score(name, **params)).status is RewardStatus.OK


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"])
async def test_no_socket_of_any_family_can_be_opened(start_pool: StartPool, family: str) -> None:
    score = await start_pool(network="deny")
    result = await score("connects", family=family)
    assert result.status is RewardStatus.ERROR
    assert "Operation not permitted" in str(result.detail["error"])


async def test_what_a_reward_starts_has_no_network_either_but_pipes(start_pool: StartPool) -> None:
    score = await start_pool(network="deny")
    result = await score("connects_in_child")
    assert result.reward == 0.0
    assert "PermissionError" in str(result.detail["stderr"])
    assert (await score("pairs")).reward == 1.0
    assert (await score("length")).reward == 3.0


async def test_memory_above_the_limit_is_an_error_and_the_worker_lives(
    start_pool: StartPool,
) -> None:
    score = await start_pool(max_memory_mib=512)
    before = (await score("pid")).reward
    result = await score("allocates", mib=600)
    assert result.status is RewardStatus.ERROR
    assert "scoring.max_memory_mib" in str(result.detail["error"])
    assert (await score("allocates", mib=100)).status is RewardStatus.OK
    assert (await score("pid")).reward == before


async def test_cpu_time_is_counted_anew_for_every_sample(start_pool: StartPool) -> None:
    score = await start_pool(max_cpu_s=1)
    before = (await score("pid")).reward
    for _ in range(4):
        assert (await score("computes", cpu_s=0.8)).status is RewardStatus.OK
    assert (await score("pid")).reward == before
    result = await score("hangs")
    assert result.status is RewardStatus.ERROR
    assert "SIGXCPU (scoring.max_cpu_s)" in str(result.detail["error"])
    assert (await score("length")).reward == 3.0


async def test_no_key_is_in_the_environment_of_a_reward_and_no_core_file_is_left(
    start_pool: StartPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = {"SLIPSTREAM_API_KEYS", "SLIPSTREAM_API_KEY", "SLIPSTREAM_API_KEY_FILE"}
    hidden |= {"RAY_AUTH_TOKEN"}
    for name in (*hidden, "JUDGE_KEY"):
        monkeypatch.setenv(name, "f00d")
    score = await start_pool()
    result = await score("variables")
    names = result.detail["names"]
    assert isinstance(names, list)
    assert "JUDGE_KEY" in names
    assert hidden.isdisjoint(str(name) for name in names)
    assert result.reward == 0.0


async def test_limits_that_cannot_be_had_stop_the_server_from_starting() -> None:
    pool = ScoringPool(ScoringConfig(max_memory_mib=2**50))
    with pytest.raises(ConfigurationError, match=r"scoring\.max_memory_mib .*too large"):
        await pool.start()


def test_an_architecture_without_a_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        deny_sockets()


@pytest.mark.parametrize("calls", confinement.SYSTEM_CALLS.values())
def test_the_filter_denies_what_it_lists_and_foreign_numbers(
    calls: confinement.SystemCalls,
) -> None:
    """Interprets the filter as the kernel does."""
    program = confinement.read_filter(confinement.build_filter(calls))

    def allows(number: int, architecture: int) -> bool:
        position, word = 0, 0
        while True:
            code, if_true, if_false, value = program[position]
            position += 1
            if code == 0x20:
                word = {0: number, 4: architecture}[value]
            elif code == 0x06:
                return value == confinement.SECCOMP_RET_ALLOW
            else:
                holds = word == value if code == 0x15 else word >= value
                position += if_true if holds else if_false

    for number in range(600):
        assert allows(number, calls.architecture) is (number not in calls.denied())
    assert not allows(0x40000000 + 1, calls.architecture)
    assert not allows(1, 0x40000003)


def test_limits_survive_the_way_to_the_worker() -> None:
    limits = WorkerLimits(max_cpu_s=1, max_memory_mib=2, denies_network=True)
    assert WorkerLimits.from_json(limits.to_json()) == limits
