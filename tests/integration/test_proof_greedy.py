"""Greedy output is Hugging Face's, token for token in float32, whatever is drafted and how.

Long form (``PROOF=1``): 200 prompts x draft lengths 0 to 8 and changing x schemes x architectures.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout_server.engine.actor import EngineActor
from shared.schemas.rollouts import SamplingOptions
from tests.support import proof
from tests.support.architectures import LLAMA, MIXTURES_OF_EXPERTS, Architecture
from tests.support.engine import changing_draft_length, generate, greedy, running_engine, speculate
from tests.support.judge import judge_greedy
from tests.support.models import greedy_reference, random_prompts
from tests.support.proof_models import MODEL_MAKERS, SelfDrafting

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

LONGEST_DRAFT = 8
NUM_TOKENS = 48
NUM_PROMPTS = 200 if proof.IS_LONG else 48
DRAFT_LENGTHS = list(range(1, LONGEST_DRAFT + 1)) if proof.IS_LONG else [2, LONGEST_DRAFT]
SMALLEST_MARGIN = 1e-5
"""Logits of two float32 implementations differ by less than this."""
CROWDED = {
    # Less than half of what all sequences want; prompts are prefilled 40 tokens at a time.
    "num_kv_blocks": 24,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 40,
}
WINDOWED = {"mistral": {"num_kv_blocks": 12}}
"""Blocks that a sliding window has left behind are free again: such models need fewer."""


def prompts_that_share_beginnings(count: int) -> list[list[int]]:
    """Half of them begin with one of four prefixes of one to four KV blocks: cache hits."""
    prompts = random_prompts(count, seed=11, longest=100)
    prefixes = random_prompts(4, seed=12, longest=140)
    for index in range(0, count, 2):
        prompts[index] = (prefixes[index % len(prefixes)] * 140)[:130] + prompts[index][:40]
    return prompts


async def check_every_draft_length(
    engine: EngineActor, model: Path, name: str, *, is_exact_drafter: bool = False
) -> None:
    prompts = prompts_that_share_beginnings(NUM_PROMPTS)
    await speculate(engine, 0)
    plain = [g[0].token_ids for g in await generate(engine, prompts, greedy(NUM_TOKENS), name="0")]
    verdict = judge_greedy(model, prompts, plain)
    assert verdict.num_tokens == NUM_PROMPTS * NUM_TOKENS
    assert verdict.num_wrong == 0
    assert verdict.smallest_margin > SMALLEST_MARGIN, "equality would hang on rounding"
    assert plain[:4] == greedy_reference(model, prompts[:4], NUM_TOKENS)
    accepted_of = {}
    for length in DRAFT_LENGTHS:
        before = await engine.speculation(0)
        await speculate(engine, length)
        drafted = await generate(engine, prompts, greedy(NUM_TOKENS), name=f"k{length}")
        after = await engine.speculation(0)
        assert [group[0].token_ids for group in drafted] == plain, f"draft length {length}"
        num_drafted = after.num_draft_tokens - before.num_draft_tokens
        num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
        assert num_accepted > 0
        assert num_accepted < num_drafted or is_exact_drafter, "rejected drafts must occur too"
        accepted_of[str(length)] = round(num_accepted / num_drafted, 4)
    async with changing_draft_length(engine, [0, 3, 1, 8, 0, 5, 2]):
        changing = await generate(engine, prompts, greedy(NUM_TOKENS), name="changing")
    assert [group[0].token_ids for group in changing] == plain
    proof.record(
        "greedy",
        name,
        num_prompts=NUM_PROMPTS,
        num_tokens_per_draft_length=verdict.num_tokens,
        num_wrong=0,
        draft_lengths=DRAFT_LENGTHS,
        smallest_margin=verdict.smallest_margin,
        accepted_of_drafted=accepted_of,
    )


async def test_every_draft_length_says_what_hugging_face_says(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    await check_every_draft_length(proof_engine, tiny_model, "qwen3-tiny int8, many KV blocks")


@pytest.mark.skipif(not proof.IS_LONG, reason="the long form: PROOF=1")
async def test_every_scheme_and_architecture_says_what_hugging_face_says(
    self_drafting: SelfDrafting,
) -> None:
    await check_every_draft_length(
        self_drafting.engine,
        self_drafting.model,
        self_drafting.name,
        is_exact_drafter=self_drafting.is_exact_drafter,
    )


@pytest.mark.skipif(not proof.IS_LONG, reason="the long form: PROOF=1")
async def test_asymmetric_int4_and_a_shared_head_say_what_hugging_face_says(tmp_path: Path) -> None:
    model = LLAMA(tmp_path, seed=0)
    drafter = {"scheme": "int4", "int4_symmetric": False, "quantize_lm_head": False}
    async with running_engine(model, drafter=drafter, max_draft_length=LONGEST_DRAFT) as engine:
        await check_every_draft_length(engine, model, "llama int4 asymmetric, shared LM head")


@pytest.mark.skipif(not proof.IS_LONG, reason="the long form: PROOF=1")
@pytest.mark.parametrize("architecture", MIXTURES_OF_EXPERTS, ids=lambda a: a.name)
async def test_mixtures_of_experts_say_what_hugging_face_says(
    tmp_path: Path, architecture: Architecture
) -> None:
    # Refused with a drafter (``drafter/support.py``), so there is no draft length to try.
    model = architecture(tmp_path, seed=0)
    prompts = prompts_that_share_beginnings(NUM_PROMPTS)
    async with running_engine(model, drafter={"enabled": False}) as engine:
        groups = await generate(engine, prompts, greedy(NUM_TOKENS))
    verdict = judge_greedy(model, prompts, [group[0].token_ids for group in groups])
    assert verdict.num_wrong == 0
    assert verdict.smallest_margin > SMALLEST_MARGIN, "equality would hang on rounding"
    proof.record(
        "experts",
        architecture.name,
        num_prompts=NUM_PROMPTS,
        num_tokens=verdict.num_tokens,
        num_wrong=0,
        smallest_margin=verdict.smallest_margin,
    )


async def test_n_samples_of_the_likeliest_token_are_all_the_greedy_one(
    proof_engine: EngineActor,
) -> None:
    # vLLM refuses n > 1 at temperature 0. Top-k 1 takes the path of sampled requests.
    prompts = random_prompts(6, seed=13)
    sampling = SamplingOptions(temperature=1.0, top_k=1, max_tokens=40, ignore_eos=True)
    await speculate(proof_engine, 0)
    plain = await generate(proof_engine, prompts, greedy(40), name="one")
    await speculate(proof_engine, 6)
    groups = await generate(proof_engine, prompts, sampling, n=4, name="four")
    for (reference,), group in zip(plain, groups, strict=True):
        assert [sample.token_ids for sample in group] == [reference.token_ids] * 4


@pytest.mark.parametrize("architecture", MODEL_MAKERS if proof.IS_LONG else ["qwen3-tiny"])
async def test_chunked_prefill_and_preemption_change_nothing(
    tmp_path: Path, architecture: str
) -> None:
    model = MODEL_MAKERS[architecture](tmp_path, seed=0)
    prompts = prompts_that_share_beginnings(40 if proof.IS_LONG else 16)
    crowded = {**CROWDED, **WINDOWED.get(architecture, {})}
    async with running_engine(model, engine=crowded, max_draft_length=LONGEST_DRAFT) as engine:
        await speculate(engine, LONGEST_DRAFT)
        drafted = await generate(engine, prompts, greedy(72), name="crowded")
        outputs = [group[0].token_ids for group in drafted]
        verdict = judge_greedy(model, prompts, outputs)
        assert verdict.num_wrong == 0
        async with changing_draft_length(engine, [0, 8, 1, 5]):
            changing = await generate(engine, prompts, greedy(72), name="changing")
        assert [group[0].token_ids for group in changing] == outputs
        load = await engine.load()
    assert load["num_preemptions"] > 0
    proof.record(
        "crowded",
        architecture,
        num_prompts=len(prompts),
        num_tokens=verdict.num_tokens * 2,
        num_wrong=0,
        num_preemptions=load["num_preemptions"],
    )
