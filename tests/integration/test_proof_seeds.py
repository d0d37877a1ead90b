"""Same seed, same weights, same draft lengths: same tokens. Different seeds: different tokens."""

from __future__ import annotations

import pytest

from rollout_server.engine.actor import EngineActor
from shared.schemas.rollouts import SamplingOptions
from tests.support import proof
from tests.support.engine import generate, speculate
from tests.support.models import random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

DRAFT_LENGTHS = [0, 1, 4, 8] if proof.IS_LONG else [0, 4]
NUM_PROMPTS = 6
"""All prompts fit into one step: a prompt prefilled in chunks draws noise it does not use."""


def seeded(seed: int) -> SamplingOptions:
    return SamplingOptions(temperature=1.0, max_tokens=48, ignore_eos=True, seed=seed)


@pytest.mark.parametrize("length", DRAFT_LENGTHS)
async def test_the_same_seed_says_the_same_twice_and_another_one_something_else(
    proof_engine: EngineActor, length: int
) -> None:
    await speculate(proof_engine, length)
    prompts = random_prompts(NUM_PROMPTS, seed=71)
    runs = [
        [[s.token_ids for s in g] for g in await generate(proof_engine, prompts, seeded(seed), n=3)]
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    for group in runs[0]:
        assert len({tuple(tokens) for tokens in group}) == 3, "samples of a group must differ"


@pytest.mark.parametrize("length", DRAFT_LENGTHS)
async def test_a_seeded_request_says_the_same_alone_and_in_company(
    proof_engine: EngineActor, length: int
) -> None:
    # Exact here: in float32 the rounding of another batch shape does not move a draw.
    await speculate(proof_engine, length)
    prompt, *others = random_prompts(9, seed=72)
    ((alone,),) = await generate(proof_engine, [prompt], seeded(9), name="alone")
    company = await generate(
        proof_engine, [*others[:4], prompt, *others[4:]], seeded(9), name="company"
    )
    assert company[4][0].token_ids == alone.token_ids
