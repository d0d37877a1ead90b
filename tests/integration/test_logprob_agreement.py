"""The trainer's logprobs of sampled tokens are the engine's, also for drafted tokens.

Bound, both in float32: ``MAX_DIFFERENCE`` per token. A policy gradient computed from the engine's
logprobs is then on-policy to rounding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout_server.engine.actor import EngineActor
from shared.config.engine import ModelConfig
from shared.schemas.rollouts import SamplingOptions
from tests.support.engine import generate, speculate
from tests.support.models import random_prompts
from trainer.batching import build_micro_batches
from trainer.policy import Policy
from trainer.samples import TrainingSample

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

MAX_DIFFERENCE = 1e-4


@pytest.mark.parametrize("num_speculative_tokens", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_trainer_and_engine_agree_on_every_sampled_token(
    engine: EngineActor, tiny_model: Path, temperature: float, num_speculative_tokens: int
) -> None:
    await speculate(engine, num_speculative_tokens)
    prompts = random_prompts(8, seed=21)
    sampling = SamplingOptions(temperature=temperature, max_tokens=48)
    groups = await generate(engine, prompts, sampling, n=4)
    samples = [
        TrainingSample(
            prompt_token_ids=prompt,
            completion_token_ids=sample.token_ids,
            behaviour_logprobs=sample.logprobs,
            min_weight_version=0,
            max_weight_version=0,
            advantage=1.0,
        )
        for prompt, group in zip(prompts, groups, strict=True)
        for sample in group
    ]
    config = ModelConfig(path=str(tiny_model), dtype="float32")
    policy = Policy.load(tiny_model, config, device=torch.device("cpu"))
    compared = 0
    largest = 0.0
    batches = build_micro_batches(
        samples, range(len(samples)), token_budget=2048, pad_token_id=policy.pad_token_id
    )
    for batch in batches:
        with torch.no_grad():
            scores = policy.score(batch, temperature)
        difference = (scores.logprobs_BT - batch.behaviour_logprobs_BT).abs()
        largest = max(largest, float(difference[batch.completion_mask_BT].max()))
        compared += batch.num_completion_tokens
    assert compared == sum(len(sample.completion_token_ids) for sample in samples) > 200
    assert largest < MAX_DIFFERENCE
