"""A service that looks like one in the middle of a training run, and a trainer that drives it."""

from __future__ import annotations

import time
import zlib

import httpx

from rollout_server.scoring.types import RewardResult, ScoreJob
from rollout_server.service import RolloutService
from shared.errors import WeightVerificationError
from shared.schemas.weights import (
    AuditResponse,
    EngineCommitTimings,
    PublishRequest,
    PublishResponse,
    WeightHistoryEntry,
    WeightsResponse,
)
from shared.types import RewardStatus
from tests.fakes.busy_engine import BusyEngine
from tests.fakes.pool import FakePool
from tests.fakes.service import FakeCoordinator, FakeScorer, fake_service

MANIFEST = {
    "segment": "slipstream-1.safetensors",
    "tensors": [{"name": "w", "dtype": "F32", "shape": [1], "num_bytes": 4, "digest": "00"}],
}
BAD_DIGEST = "ff"


class LearningScorer(FakeScorer):
    """Right answers become more frequent with the version in the prompt's metadata."""

    async def score(self, job: ScoreJob) -> RewardResult:
        version = job.metadata["version"]
        assert isinstance(version, int)
        luck = zlib.crc32(job.completion.encode() + bytes(job.prompt_token_ids)) % 100
        reward = float(luck < min(95, 30 + 9 * version))
        return RewardResult(reward=reward, status=RewardStatus.OK, duration_s=0.001)


class RecordingCoordinator(FakeCoordinator):
    """Keeps a history, with phases, and refuses tensors with the digest ``ff``."""

    def __init__(self, pool: FakePool) -> None:
        super().__init__()
        self._pool = pool
        self._history: list[WeightHistoryEntry] = []

    async def publish(self, request: PublishRequest) -> PublishResponse:
        if request.manifest.tensors[0].digest == BAD_DIGEST:
            error = "tensor model.layers.3.mlp.down_proj.weight: its digest is not the manifest's"
            self._history.append(
                WeightHistoryEntry(
                    version=request.version, committed=False, total_s=0.11, error=error
                )
            )
            raise WeightVerificationError(error)
        response = await super().publish(request)
        for engine in self._pool.members:
            await engine.load_weights(request.version)
        spread = 1 + (request.version * 37 % 10) / 20
        phases = {"verifying": 0.06, "staging": 0.03, "loading": 0.21, "recording": 0.01}
        phases_s = {name: took * spread for name, took in phases.items()} | {"resume": 0.02}
        total_s = sum(phases_s.values())
        self._history.append(
            WeightHistoryEntry(version=request.version, committed=True, total_s=total_s)
        )
        timings = EngineCommitTimings(
            engine_id="engine-0",
            stage_s=0.03,
            pause_s=0.01,
            load_s=0.1,
            requantize_s=0.09,
            resume_s=0.02,
            paused_s=0.24 * spread,
        )
        return response.model_copy(
            update={"phases_s": phases_s, "total_s": total_s, "engines": [timings]}
        )

    async def audit(self) -> AuditResponse:
        engines = [await engine.audit("") for engine in self._pool.members]
        return AuditResponse(version=self.committed_version, is_intact=True, engines=engines)

    def status(self) -> WeightsResponse:
        return super().status().model_copy(update={"history": list(self._history)})


def busy_pool(num_engines: int = 2) -> FakePool:
    """Engines whose batches are not in step."""
    return FakePool(
        [
            BusyEngine(f"engine-{index}", phase_s=5.0 * index, delay_s=0.02)
            for index in range(num_engines)
        ]
    )


def busy_service(pool: FakePool) -> RolloutService:
    """Over engines of ``busy_pool``; events come five times a second."""
    return fake_service(
        pool=pool,
        scorer=LearningScorer(),
        coordinator=RecordingCoordinator(pool),
        server={"status_poll_s": 0.1, "dashboard": {"interval_s": 0.2}},
    )


async def train(url: str, num_steps: int) -> None:
    """Sampled groups, sometimes greedy ones, and a push; one push in the middle is refused."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        version = (await client.get("/v1/weights")).json()["committed_version"]
        for step in range(num_steps):
            await _roll_out(client, version, n=4, temperature=1.0)
            if step % 2 == 0:
                await _roll_out(client, version, n=1, temperature=0.0, num_prompts=20)
            if step == num_steps // 2:
                await _push(client, version, digest=BAD_DIGEST)
            await _push(client, version)
            version += 1


async def _roll_out(
    client: httpx.AsyncClient, version: int, *, n: int, temperature: float, num_prompts: int = 6
) -> None:
    prompts = [
        {
            "prompt": f"What is 17 + {index}? (problem {time.time_ns() % 10_000})",
            "answer": str(17 + index),
            "metadata": {"version": version},
        }
        for index in range(num_prompts)
    ]
    body = {
        "prompts": prompts,
        "n": n,
        "sampling": {"temperature": temperature},
        "reward": {"name": "length"},
    }
    (await client.post("/v1/rollouts", json=body)).raise_for_status()


async def _push(client: httpx.AsyncClient, version: int, digest: str = "00") -> None:
    tensor = {**MANIFEST["tensors"][0], "digest": digest}  # type: ignore[dict-item,index]
    manifest = {**MANIFEST, "tensors": [tensor]}
    push = {"version": version + 1, "base_version": version, "manifest": manifest}
    await client.post("/v1/weights", json=push)
