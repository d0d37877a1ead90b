"""The API over fakes as the documentation speaks of it, on a thread of its own."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rollout_server.engine.protocol import ModelInfo
from rollout_server.service import RolloutService
from shared.schemas.rollouts import RewardSpec
from shared.schemas.weights import (
    AuditResponse,
    EngineAudit,
    EngineVersions,
    PushStatus,
    WeightHistoryEntry,
    WeightsResponse,
)
from shared.types import PushPhase
from tests.fakes.engine import VOCAB_SIZE, FakeEngine
from tests.fakes.http_server import serving
from tests.fakes.pool import FakePool
from tests.fakes.service import FakeCoordinator, FakeScorer, fake_service

MODEL_ID = ".cache/models/tiny-arithmetic"


class DocsScorer(FakeScorer):
    """Knows the built-in rewards by name; completions of made-up engines are all alike to it."""

    def reward_names(self) -> list[str]:
        return ["exact_match", "format", "length_penalty", "numeric_answer", "regex"]

    def validate_reward(self, spec: RewardSpec) -> None:
        if spec.name not in self.reward_names():
            super().validate_reward(spec)


class DocsCoordinator(FakeCoordinator):
    """Answers with everything that a real one's answers have."""

    def status(self) -> WeightsResponse:
        version = self.committed_version
        return WeightsResponse(
            committed_version=version,
            push=PushStatus(version=version + 1, phase=PushPhase.REFUSED),
            engines=[
                EngineVersions(
                    engine_id="engine-0", target_version=version, drafter_version=version
                )
            ],
            history=[
                WeightHistoryEntry(
                    version=version + 1, committed=False, total_s=0.4, error="digest differs"
                )
            ],
        )

    async def audit(self) -> AuditResponse:
        engine = EngineAudit(
            engine_id="engine-0",
            version=self.committed_version,
            num_equal=1,
            num_skipped=0,
            different=[],
            audit_s=0.1,
        )
        return AuditResponse(version=engine.version, is_intact=True, engines=[engine])


@contextmanager
def docs_server() -> Iterator[str]:
    """Yields the base URL."""
    urls: queue.Queue[str | BaseException] = queue.Queue()
    is_over = threading.Event()

    async def serve() -> None:
        async with serving(_service()) as url:
            urls.put(url)
            await asyncio.to_thread(is_over.wait)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as exc:  # noqa: BLE001  # told to whoever waits for the URL
            urls.put(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        url = urls.get(timeout=30)
        if isinstance(url, BaseException):
            raise url
        yield url
    finally:
        is_over.set()
        thread.join(30)
    if not urls.empty():
        raise AssertionError("the server did not end well") from _error(urls.get())


def _error(result: str | BaseException) -> BaseException | None:
    return result if isinstance(result, BaseException) else None


def _service() -> RolloutService:
    pool = FakePool([FakeEngine("engine-0")])
    pool.model = ModelInfo(model_id=MODEL_ID, vocab_size=VOCAB_SIZE, max_model_len=1024)
    return fake_service(pool=pool, scorer=DocsScorer(), coordinator=DocsCoordinator())
