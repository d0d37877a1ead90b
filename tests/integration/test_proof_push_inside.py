"""A weight push inside a sequence: exactly the tokens and logprobs of the weights that made them.

The judge is Hugging Face with a KV cache of mixed origin: what a sequence had computed under the
old weights is kept, all later positions are computed under the new ones. The boundary comes from
the sample's own ``weight_versions``, so a wrong span fails too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import DynamicCache

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.protocol import GeneratedSample
from shared.schemas.rollouts import SamplingOptions
from tests.support import proof
from tests.support.engine import (
    changing_draft_length,
    generate,
    push,
    running_engine,
    speculate,
    wait_for_tokens,
)
from tests.support.judge import load_judge
from tests.support.models import make_model, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

NUM_TOKENS = 300
NUM_PROMPTS = 12 if proof.IS_LONG else 4
NUM_PUSHES = 4 if proof.IS_LONG else 2
MAX_LOGPROB_DIFFERENCE = 1e-4


@dataclass(kw_only=True, slots=True)
class Pushable:
    """An engine whose versions' models are all at hand."""

    engine: EngineActor
    models: dict[int, Path]
    """By version."""
    directory: Path

    async def push_next(self) -> None:
        """A model nobody has seen, as the next version."""
        version = max(self.models) + 1
        model = make_model(self.directory / f"v{version}", seed=50 + version)
        await push(self.engine, model, version, self.directory)
        self.models[version] = model


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pushable(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pushable]:
    directory = tmp_path_factory.mktemp("push-inside")
    first = make_model(directory / "v0", seed=50)
    async with running_engine(first) as engine:
        yield Pushable(engine=engine, models={0: first}, directory=directory)


@torch.no_grad()
def mixed_logits(
    models: dict[int, Path], prompt: list[int], sample: GeneratedSample
) -> torch.Tensor:
    """Logits [T, V] of each token, each span under its own weights over the KV so far."""
    cache = DynamicCache()
    logits = []
    tokens = sample.token_ids
    for span in sample.weight_versions:
        # The newest token of a span gets its KV in the next step, under the next weights.
        fed = (prompt if span.start == 0 else tokens[span.start - 1 : span.start]) + tokens[
            span.start : span.end - 1
        ]
        scores_LV = load_judge(models[span.version])(
            torch.tensor([fed]), past_key_values=cache, use_cache=True
        ).logits[0]
        logits.append(scores_LV[-(span.end - span.start) :])
    return torch.cat(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lengths", [[0], [5], [0, 5, 1, 3]], ids=["plain", "drafting", "changing"])
async def test_tokens_before_and_after_a_push_are_those_of_their_own_weights(
    pushable: Pushable, lengths: list[int], temperature: float
) -> None:
    engine = pushable.engine
    first_version = max(pushable.models)
    prompts = random_prompts(NUM_PROMPTS, seed=51)
    sampling = SamplingOptions(temperature=temperature, max_tokens=NUM_TOKENS, ignore_eos=True)
    await speculate(engine, lengths[0])
    before = (await engine.load())["num_generation_tokens"]
    running = asyncio.create_task(generate(engine, prompts, sampling))
    async with changing_draft_length(engine, lengths):
        for index in range(1, NUM_PUSHES + 1):
            share = index / (NUM_PUSHES + 1)
            await wait_for_tokens(engine, before + int(share * NUM_TOKENS * NUM_PROMPTS))
            await pushable.push_next()
        groups = await running
    largest, num_tokens = 0.0, 0
    for prompt, (sample,) in zip(prompts, groups, strict=True):
        spans = sample.weight_versions
        assert [span.version for span in spans] == list(
            range(first_version, first_version + NUM_PUSHES + 1)
        )
        logits_TV = mixed_logits(pushable.models, prompt, sample)
        tokens = torch.tensor(sample.token_ids)
        if temperature == 0.0:
            assert logits_TV.argmax(dim=-1).tolist() == sample.token_ids
        else:
            expected = logits_TV.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
            difference = (expected - torch.tensor(sample.logprobs)).abs().max()
            largest = max(largest, float(difference))
        num_tokens += len(sample.token_ids)
    assert largest < MAX_LOGPROB_DIFFERENCE
    proof.record(
        "push_inside",
        f"draft lengths {lengths}, temperature {temperature}",
        num_sequences=NUM_PROMPTS,
        num_tokens=num_tokens,
        num_pushes=NUM_PUSHES,
        num_wrong=0,
        largest_logprob_difference=largest if temperature else None,
    )
