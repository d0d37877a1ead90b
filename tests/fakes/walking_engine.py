"""An engine in memory that samples token by token, and whose tokens follow from those before them.

So whoever goes on from a prefix, on whichever engine, has to arrive at the same completion.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from rollout_server.engine.protocol import (
    GeneratedSample,
    GenerateRequest,
    GenerateResult,
    KnownTokens,
    SampleProgress,
)
from shared.schemas.rollouts import WeightVersionSpan
from shared.types import FinishReason
from tests.fakes.engine import FakeEngine

END_MODULUS = 29
"""A completion has about so many tokens."""


def next_token(token_ids: list[int]) -> int:
    """A lower-case letter."""
    return 97 + (sum(token_ids) + 3 * len(token_ids)) % 26


def has_ended(token_ids: list[int]) -> bool:
    return (7 * sum(token_ids) + len(token_ids)) % END_MODULUS == 0


def completion(prompt_token_ids: list[int], max_tokens: int) -> list[int]:
    """What every sample of this prompt has to be."""
    token_ids = list(prompt_token_ids)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids))
        if has_ended(token_ids):
            break
    return token_ids[len(prompt_token_ids) :]


@dataclass(slots=True)
class _Walk:
    """One sample on its way."""

    prompt: list[int]
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    spans: list[WeightVersionSpan] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def step(self, version: int) -> None:
        if self.finish_reason is not None:
            return
        self.token_ids.append(next_token([*self.prompt, *self.token_ids]))
        end = len(self.token_ids)
        start = end - 1
        if self.spans and self.spans[-1].version == version:
            start = self.spans.pop().start
        self.spans.append(WeightVersionSpan(version=version, start=start, end=end))
        if has_ended([*self.prompt, *self.token_ids]):
            self.finish_reason = FinishReason.STOP
        elif end == self.max_tokens:
            self.finish_reason = FinishReason.LENGTH

    def sample(self, index: int) -> GeneratedSample:
        return GeneratedSample(
            sample_index=index,
            token_ids=list(self.token_ids),
            logprobs=[-float(token_id) for token_id in self.token_ids],
            text="".join(map(chr, self.token_ids)),
            finish_reason=self.finish_reason or FinishReason.ABORT,
            weight_versions=list(self.spans),
            num_draft_tokens=0,
            num_accepted_tokens=0,
        )


@dataclass(eq=False)
class WalkingEngine(FakeEngine):
    """One token per sample and ``step_s``; samples of a group end at different times."""

    step_s: float = 0.001
    stalls_after: int | None = None
    """Steps of a group after which it makes no more tokens of it, though it answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._walks: dict[str, list[_Walk]] = {}

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self._raise_if_failing()
        self.requests.append(request)
        aborted = self._abort_events.setdefault(request.request_id, asyncio.Event())
        walks = [
            _Walk(request.prompt_token_ids, request.sampling.max_tokens) for _ in range(request.n)
        ]
        self._walks[request.request_id] = walks
        self.num_running += request.n
        num_steps = 0
        try:
            while not aborted.is_set() and any(walk.finish_reason is None for walk in walks):
                await asyncio.sleep(self.step_s)
                await self.unblocked.wait()
                self._raise_if_failing()
                if num_steps == self.stalls_after:
                    continue
                num_steps += 1
                for index, walk in enumerate(walks):
                    if num_steps > index:  # they begin one after the other
                        walk.step(self.committed_version)
        finally:
            self.num_running -= request.n
            del self._walks[request.request_id], self._abort_events[request.request_id]
        return GenerateResult(
            engine_id=self.engine_id,
            samples=[walk.sample(index) for index, walk in enumerate(walks)],
            generate_s=num_steps * self.step_s,
        )

    async def progress(self, known: Mapping[str, KnownTokens]) -> dict[str, list[SampleProgress]]:
        self._raise_if_failing()
        self.num_progress_asked += 1
        news: dict[str, list[SampleProgress]] = {}
        for request_id, tokens in known.items():
            for index, walk in enumerate(self._walks.get(request_id, [])):
                sample = walk.sample(index)
                start = tokens.num_tokens.get(index, 0)
                if walk.finish_reason is not None and index not in tokens.finished:
                    told = SampleProgress(sample_index=index, whole=sample)
                elif walk.finish_reason is None and len(sample.token_ids) > start:
                    told = SampleProgress(
                        sample_index=index,
                        start=start,
                        token_ids=sample.token_ids[start:],
                        logprobs=sample.logprobs[start:],
                        weight_versions=sample.weight_versions,
                    )
                else:
                    continue
                news.setdefault(request_id, []).append(told)
        return news
