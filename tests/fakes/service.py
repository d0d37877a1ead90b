"""A whole service over fakes, and the small fakes it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import httpx

from rollout_server.api.app import create_app
from rollout_server.collaborators import Tokenizer
from rollout_server.rollouts.ledger import Ledger
from rollout_server.scoring.types import RewardResult, ScoreJob, ScoreOutcome
from rollout_server.service import RolloutService
from shared.api_keys import ApiKeys
from shared.config.loading import validate_run_config
from shared.errors import ConflictError, InvalidRequestError, ScoringError
from shared.schemas.rollouts import ChatMessage, RewardSpec
from shared.schemas.weights import (
    AuditResponse,
    PublishRequest,
    PublishResponse,
    WeightsResponse,
)
from shared.types import RewardStatus
from tests.fakes.engine import FakeEngine
from tests.fakes.pool import FakePool


class FakeTokenizer:
    """UTF-8 bytes are tokens."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode(errors="replace")

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        if messages[0].role == "tool":
            raise InvalidRequestError("a conversation cannot begin with a tool", param="messages")
        return self.encode("".join(f"{message.role}:{message.content};" for message in messages))


class FakeScorer:
    """Rewards the length of the completion."""

    def __init__(self) -> None:
        self.jobs: list[ScoreJob] = []
        self.broken = False
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.is_running = False
        self.num_queued = 0
        self.num_worker_restarts = 0

    async def start(self) -> None:
        self.is_running = True

    async def close(self) -> None:
        self.is_running = False

    def reward_names(self) -> list[str]:
        return ["length"]

    def validate_reward(self, spec: RewardSpec) -> None:
        if spec.name != "length":
            raise InvalidRequestError(f"reward {spec.name!r} is not known", param="reward.name")

    async def score(self, job: ScoreJob) -> RewardResult:
        self.jobs.append(job)
        await self.unblocked.wait()
        if self.broken:
            raise ScoringError("the pool is broken")
        return RewardResult(
            reward=float(len(job.completion)),
            status=RewardStatus.OK,
            detail={"answer": job.answer},
            duration_s=0.001,
        )

    async def score_group(self, jobs: Sequence[ScoreJob]) -> list[ScoreOutcome]:
        return await asyncio.gather(*(self._outcome(job) for job in jobs))

    async def _outcome(self, job: ScoreJob) -> ScoreOutcome:
        try:
            return await self.score(job)
        except ScoringError as exc:
            return exc


class FakeCoordinator:
    """Commits whatever follows the committed version."""

    def __init__(self, committed_version: int = 0) -> None:
        self.committed_version = committed_version

    async def publish(self, request: PublishRequest) -> PublishResponse:
        if request.base_version != self.committed_version:
            raise ConflictError(
                f"base_version {request.base_version} is not {self.committed_version}",
                param="base_version",
            )
        self.committed_version = request.version
        return PublishResponse(
            version=request.version, verify_s=0.0, total_s=0.1, num_bytes=0, engines=[]
        )

    async def audit(self) -> AuditResponse:
        report = AuditResponse(version=self.committed_version, is_intact=True, engines=[])
        self.on_audit(report)
        return report

    def observe_audits(self, observer: Callable[[AuditResponse], None]) -> None:
        self.on_audit = observer

    def status(self) -> WeightsResponse:
        return WeightsResponse(committed_version=self.committed_version, engines=[], history=[])

    async def close(self) -> None:
        return None


def fake_service(
    engines: Sequence[FakeEngine] | None = None,
    *,
    pool: FakePool | None = None,
    scorer: FakeScorer | None = None,
    coordinator: FakeCoordinator | None = None,
    tokenizer: Tokenizer | None = None,
    server: dict[str, object] | None = None,
    ledger: Ledger | None = None,
    max_num_seqs: int = 8,
    engine: dict[str, object] | None = None,
) -> RolloutService:
    """A service that is not started.

    Args:
        server: settings of ``config.server``.
        engine: settings of ``config.engine``.
    """
    members = [FakeEngine("engine-0")] if engines is None else engines
    config = validate_run_config(
        {
            "model": {"path": "models/tiny"},
            "server": {"status_poll_s": 0.01, "shutdown_timeout_s": 1.0, **(server or {})},
            "engine": {"max_num_seqs": max_num_seqs, **(engine or {})},
        }
    )
    return RolloutService(
        config,
        pool or FakePool(members),
        scorer or FakeScorer(),
        coordinator or FakeCoordinator(),
        tokenizer or FakeTokenizer(),
        ledger,
    )


@asynccontextmanager
async def running(
    service: RolloutService, api_keys: ApiKeys | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """Start the service, hand out a client of its API, and check the books at the end."""
    await service.start()
    await service.restore()
    transport = httpx.ASGITransport(create_app(service, api_keys), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    finally:
        await service.close()
        service.router.accounts.check()
        assert service.router.accounts.num_pending == 0


async def until(condition: object, what: str) -> None:
    """Let the loop run until ``condition()`` holds; fails, naming ``what``, after 10 s."""
    assert callable(condition)
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"waited 10 s for {what}")
