"""Same seed, same weights, same draft lengths: same tokens. Different seeds: different tokens.

Requests run one at a time here. In company, a batch of another shape rounds float32 differently in
the last bit; a plain engine's draws do not notice, but a drafter that quantizes its activations
may round one of them to the next code, and a draft's probability then moves by a thousandth.
"""

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


def seeded(seed: int) -> SamplingOptions:
    return SamplingOptions(temperature=1.0, max_tokens=48, ignore_eos=True, seed=seed)


@pytest.mark.parametrize("length", DRAFT_LENGTHS)
async def test_the_same_seed_says_the_same_twice_and_another_one_something_else(
    proof_engine: EngineActor, length: int
) -> None:
    await speculate(proof_engine, length)
    prompts = random_prompts(NUM_PROMPTS, seed=71)
    runs = []
    for seed in (5, 5, 6):
        groups = [await generate(proof_engine, [p], seeded(seed)) for p in prompts]
        runs.append([sample.token_ids for ((sample,),) in groups])
    assert runs[0] == runs[1]
    assert all(first != other for first, other in zip(runs[0], runs[2], strict=True))


async def test_samples_of_a_seeded_group_differ(proof_engine: EngineActor) -> None:
    await speculate(proof_engine, 4)
    (group,) = await generate(proof_engine, random_prompts(1, seed=71), seeded(5), n=3)
    assert len({tuple(sample.token_ids) for sample in group}) == 3


async def test_a_seeded_request_says_the_same_alone_and_in_company(
    proof_engine: EngineActor,
) -> None:
    # Exact without drafts: in float32 the rounding of another batch shape does not move a draw.
    await speculate(proof_engine, 0)
    prompt, *others = random_prompts(9, seed=72)
    ((alone,),) = await generate(proof_engine, [prompt], seeded(9), name="alone")
    company = await generate(
        proof_engine, [*others[:4], prompt, *others[4:]], seeded(9), name="company"
    )
    assert company[4][0].token_ids == alone.token_ids


@pytest.mark.parametrize("length", [0, 3])
async def test_seeded_prompts_prefilled_in_pieces_are_served(
    proof_engine: EngineActor, length: int
) -> None:
    # 40 prompts of 90 tokens are more than a step takes: vLLM's CPU engine died of this.
    await speculate(proof_engine, length)
    prompts = [prompt[:3] * 30 for prompt in random_prompts(40, seed=73, longest=3)]
    prompts = [(prompt * 90)[:90] for prompt in prompts]
    groups = await generate(proof_engine, prompts, seeded(3), name="pieces")
    assert all(len(group[0].token_ids) == 48 for group in groups)
