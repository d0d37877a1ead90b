"""An engine whose figures move as those of a training run do: batches that fill and empty its KV
cache, speculation in their tails, rewards that rise with the weight version."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from rollout_server.engine.protocol import GeneratedSample, GenerateRequest
from shared.schemas.engines import EngineStatus
from shared.schemas.speculation import EngineSpeculation, SpeculationStep
from shared.types import SpeculationReason
from tests.fakes.engine import FakeEngine

PERIOD_S = 12.0
THRESHOLD = 0.5
STEPS_PER_S = 10
PEAK_REQUESTS = 24


@dataclass(eq=False)
class BusyEngine(FakeEngine):
    """``phase_s`` keeps several of them apart."""

    phase_s: float = 0.0
    born_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._num_tokens = 0.0
        self._counted_s = self.born_s

    def usage(self, time_s: float) -> float:
        """A batch: filled at once, longest samples last."""
        part = ((time_s + self.phase_s) % PERIOD_S) / PERIOD_S
        if part > 0.92:
            return 0.0
        rise = min(1.0, part / 0.12)
        return 0.72 * rise * (1 - max(0.0, part - 0.45) / 0.47) ** 1.4

    def draft_length(self, usage: float) -> int:
        """Longer where fewer run."""
        return 0 if usage >= THRESHOLD or usage == 0 else 4 if usage < THRESHOLD / 2 else 2

    async def status(self) -> EngineStatus:
        now_s = time.time()
        usage = self.usage(now_s)
        self._num_tokens += 400 * math.sqrt(usage) * (now_s - self._counted_s)
        self._counted_s = now_s
        update = {
            "kv_cache_usage": usage,
            "num_kv_blocks": 1200,
            "num_running_reqs": round(PEAK_REQUESTS * usage / 0.72),
            "num_waiting_reqs": 6 if usage > 0.6 else 0,
            "num_generation_tokens": int(self._num_tokens),
            "uptime_s": now_s - self.born_s,
            "pid": 4711,
        }
        return (await super().status()).model_copy(update=update)

    async def speculation(self, since_step: int) -> EngineSpeculation:
        now_s = time.time()
        report = await super().speculation(2**62)
        num_steps = int((now_s - self.born_s) * STEPS_PER_S)
        first = max(since_step + 1, num_steps - 600, 1)
        history = [self._step(step) for step in range(first, num_steps + 1)]
        length = self.draft_length(self.usage(now_s))
        return report.model_copy(
            update={
                "history": history,
                "num_speculative_tokens": length,
                "enabled": length > 0,
                "reason": SpeculationReason.PREDICTED_FASTER
                if length
                else SpeculationReason.ABOVE_THRESHOLD,
                "num_draft_tokens": 40 * num_steps + 40,
                "num_accepted_tokens": 33 * num_steps + 33,
                "num_drafts": 10 * num_steps + 10,
                "mean_acceptance_length": 4.3,
            }
        )

    def _step(self, step: int) -> SpeculationStep:
        time_s = self.born_s + step / STEPS_PER_S
        usage = self.usage(time_s)
        return SpeculationStep(
            step=step,
            time_s=time_s,
            kv_cache_usage=usage,
            num_running_reqs=1,
            num_waiting_reqs=0,
            num_speculative_tokens=self.draft_length(usage),
            reason=SpeculationReason.BELOW_THRESHOLD,
        )

    def _sample(self, request: GenerateRequest, index: int, was_aborted: bool) -> GeneratedSample:
        sample = FakeEngine._sample(self, request, index, was_aborted)
        text = f" Let us add: 17 + {index} = {17 + index}.\nSo the answer is {17 + index}."
        token_ids = list(text.encode())
        logprobs = [
            -0.02 if (position * 7 + index) % 5 else -0.6 * ((position * 3 + index) % 9)
            for position in range(len(token_ids))
        ]
        spans = [sample.weight_versions[0].model_copy(update={"end": len(token_ids)})]
        return GeneratedSample(
            sample_index=index,
            token_ids=token_ids,
            logprobs=logprobs,
            text=text,
            finish_reason=sample.finish_reason,
            weight_versions=spans,
            num_draft_tokens=48,
            num_accepted_tokens=39 - index,
            token_origins=("aaabpaar" * len(token_ids))[: len(token_ids)],
        )
