"""Engines in memory die by the thousand under real routes, and every answer is checked.

Clients post groups all the time; some abort theirs, some go away, some set deadlines. Engines die
at random moments and others come in their place, weight versions go up, and late samples change
engines. Every token of every sample that comes back is compared with what its prompt leads to,
whoever sampled it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from shared.types import EngineState
from tests.fakes.pool import FakePool
from tests.fakes.service import fake_service, running, until
from tests.fakes.walking_engine import WalkingEngine, completion

NUM_ENGINES = 4
NUM_CLIENTS = 12
MAX_TOKENS = 60
HANG_S = 60.0


@dataclass(kw_only=True, slots=True)
class FakeKillCounts:
    """What a run adds up to."""

    kills: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    """By how they were to end."""
    checked_samples: int = 0
    kept_tokens: int = 0
    handed_over: int = 0
    lost: int = 0
    duplicated: int = 0
    mixed_version: int = 0
    """Samples whose spans do not cover every token once, in order of versions."""
    wrong_tokens: int = 0
    hangs: int = 0


class FakeKillRun:
    """One service over engines in memory."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.counts = FakeKillCounts()
        self._names = map(str, itertools.count())
        self._pool = FakePool([self._engine() for _ in range(NUM_ENGINES)])
        self._version = 0
        self._is_over = False

    def _engine(self) -> WalkingEngine:
        return WalkingEngine(f"engine-{next(self._names)}", step_s=0.001)

    async def run(self, num_kills: int) -> FakeKillCounts:
        """Until so many engines have died."""
        service = fake_service(
            pool=self._pool,
            server={
                "progress_interval_s": 0.003,
                "max_generate_attempts": 1000,
                "stragglers": {"enabled": True, "patience": 1.0, "max_samples": 3},
            },
            max_num_seqs=16,
        )
        async with running(service) as client:
            clients = [
                asyncio.create_task(self._client(client, number)) for number in range(NUM_CLIENTS)
            ]
            while self.counts.kills < num_kills:
                await asyncio.sleep(self._random.uniform(0.0, 0.008))
                self._kill_one()
            self._is_over = True
            await asyncio.gather(*clients)
            self.counts.kept_tokens = service.router.num_kept_tokens
            self.counts.handed_over = service.router.stragglers.num_handed_over
            accounts = service.router.accounts
            # Requests whose clients have left run on: they have a name to be asked for by.
            await until(lambda: accounts.num_pending == 0, "what clients left to end")
            delivered = sum(
                accounts_part for accounts_part in (accounts.num_delivered, accounts.num_cancelled)
            )
            # Rejected ones were never accepted; none may have failed.
            self.counts.lost += accounts.num_accepted - delivered
        return self.counts

    def _kill_one(self) -> None:
        living = [engine for engine in self._pool.members if engine.state is EngineState.SERVING]
        victim = self._random.choice(living)
        victim.die()
        self._pool.members.remove(victim)
        self._pool.members.append(self._engine())
        self.counts.kills += 1
        if self._random.random() < 0.2:
            self._version += 1
        for engine in self._pool.members:
            engine.committed_version = self._version

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        choose = random.Random(f"{number} {self._random.random()}")
        for serial in itertools.count():
            if self._is_over:
                return
            fate = choose.choices(
                ["answered", "aborted", "left", "late", "over-provisioned"], [8, 1, 1, 1, 2]
            )[0]
            self.counts.requests[fate] += 1
            try:
                async with asyncio.timeout(HANG_S):
                    await self._one(http, f"c{number}-{serial}", fate, choose)
            except TimeoutError:
                self.counts.hangs += 1

    async def _one(
        self, http: httpx.AsyncClient, name: str, fate: str, choose: random.Random
    ) -> None:
        prompts = [
            [choose.randrange(1, 200) for _ in range(choose.randint(1, 8))]
            for _ in range(choose.randint(1, 3))
        ]
        body: dict[str, Any] = {
            "request_id": name,
            "prompts": [{"prompt_token_ids": prompt} for prompt in prompts],
            "n": choose.randint(1, 4),
            "sampling": {"max_tokens": MAX_TOKENS},
        }
        if fate == "late":
            body["deadline_s"] = choose.uniform(0.005, 0.05)
        if fate == "over-provisioned":
            body["over_provision"] = choose.randint(1, 3)
        posting = asyncio.create_task(http.post("/v1/rollouts", json=body))
        if fate in ("aborted", "left"):
            await asyncio.sleep(choose.uniform(0.0, 0.04))
        if fate == "left":
            posting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await posting
            return
        if fate == "aborted":
            ended = await http.delete(f"/v1/rollouts/{name}")
            assert ended.status_code in (200, 404), ended.text  # 404: before it was accepted
        answer = await posting
        if answer.status_code != 200:
            self.counts.lost += len(prompts) * body["n"]
            return
        self._check(
            answer.json()["groups"], prompts, body["n"], may_end=fate in ("aborted", "late")
        )
        if fate == "answered" and choose.random() < 0.1:
            again = await http.post("/v1/rollouts", json=body)
            if again.content != answer.content:
                self.counts.duplicated += 1

    def _check(
        self, groups: list[dict[str, Any]], prompts: list[list[int]], n: int, *, may_end: bool
    ) -> None:
        self.counts.lost += max(0, len(prompts) - len(groups))
        for group, prompt in zip(groups, prompts, strict=False):
            expected = completion(prompt, MAX_TOKENS)
            indices = [sample["sample_index"] for sample in group["samples"]]
            self.counts.lost += len(set(range(n)) - set(indices))
            self.counts.duplicated += len(indices) - len(set(indices))
            for sample in group["samples"]:
                self._check_sample(sample, expected, may_end)

    def _check_sample(self, sample: dict[str, Any], expected: list[int], may_end: bool) -> None:
        self.counts.checked_samples += 1
        token_ids = sample["token_ids"]
        if sample["finish_reason"] == "abort" and may_end:
            expected = expected[: len(token_ids)]
        if token_ids != expected or sample["logprobs"] != [-float(t) for t in token_ids]:
            self.counts.wrong_tokens += 1
        spans = sample["weight_versions"]
        covered = [i for span in spans for i in range(span["start"], span["end"])]
        versions = [span["version"] for span in spans]
        if covered != list(range(len(token_ids))) or versions != sorted(set(versions)):
            self.counts.mixed_version += 1
