"""Provisional KV stays in its own request's reserved slots, and never outlives its step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.protocol import GenerateRequest
from shared.schemas.rollouts import SamplingOptions
from tests.support import proof
from tests.support.engine import (
    PROBE,
    changing_draft_length,
    forget_prefixes,
    generate,
    greedy,
    probe,
    running_engine,
    speculate,
    wait_for_tokens,
)
from tests.support.judge import judge_greedy
from tests.support.models import CONTEXT_LENGTH, random_prompts, stretched

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

CROWDED = {"num_kv_blocks": 24, "max_num_seqs": 8, "max_num_batched_tokens": 48}
NUM_PROMPTS = 48 if proof.IS_LONG else 12
MAX_KV_DIFFERENCE = 1e-5
"""Of one float32 computation in batches of other shapes; entries are of the order of 1."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def crowded(tiny_model: Path) -> AsyncIterator[EngineActor]:
    """Sequences want twice the KV blocks there are."""
    async with running_engine(
        tiny_model, engine=CROWDED, max_draft_length=8, worker_extension=PROBE
    ) as actor:
        yield actor


@asynccontextmanager
async def guarded(engine: EngineActor, *, poison: bool = False) -> AsyncIterator[dict[str, Any]]:
    """Watch the KV cache inside; afterwards the dictionary is ``KvReport``."""
    report: dict[str, Any] = {}
    await probe(engine, "probe_guard_kv", poison)
    try:
        yield report
    finally:
        report.update(await probe(engine, "probe_kv_report"))


@pytest.mark.parametrize("poison", [False, True], ids=["watched", "poisoned"])
async def test_no_step_writes_outside_the_slots_of_its_own_requests(
    crowded: EngineActor, tiny_model: Path, poison: bool
) -> None:
    # Chunked prefill, preemption, prefix-cache hits, draft lengths that change. Poisoned: all of a
    # request's slots that hold nothing valid are spoilt after every step, so a provisional entry
    # that were ever read again would change the output.
    prompts = random_prompts(NUM_PROMPTS, seed=31, longest=150)
    prompts += [prompts[0][:96] + prompt[:30] for prompt in prompts[1:7]]
    preemptions_before = (await crowded.load())["num_preemptions"]
    async with guarded(crowded, poison=poison) as report:
        await speculate(crowded, 8)
        drafted = await generate(crowded, prompts, greedy(60), name="drafted")
        async with changing_draft_length(crowded, [0, 8, 1, 4]):
            changing = await generate(crowded, prompts, greedy(60), name="changing")
        sampling = SamplingOptions(temperature=1.0, max_tokens=60, ignore_eos=True)
        await speculate(crowded, 5)
        await generate(crowded, prompts, sampling, name="sampled", n=2)
    num_preemptions = (await crowded.load())["num_preemptions"] - preemptions_before
    assert report["messages"] == []
    assert report["num_stray_slots"] == 0
    assert report["num_foreign_slots"] == 0
    assert report["num_provisional_slots"] > 1000, "nothing was drafted"
    assert num_preemptions > 0
    outputs = [group[0].token_ids for group in drafted]
    assert judge_greedy(tiny_model, prompts, outputs).num_wrong == 0
    assert [group[0].token_ids for group in changing] == outputs
    assert (report["num_poisoned_slots"] > 0) == poison
    proof.record(
        "kv_writes",
        "poisoned" if poison else "watched",
        num_preemptions=num_preemptions,
        **{name: value for name, value in report.items() if name != "messages"},
    )


async def test_the_guard_sees_a_single_stray_slot(crowded: EngineActor) -> None:
    await speculate(crowded, 3)
    async with guarded(crowded) as report:
        await probe(crowded, "probe_plant_stray_write", 23, 17)
        await generate(crowded, [[4, 5, 6]], greedy(6))
    assert report["num_stray_slots"] >= 1
    assert "block 23 slot 17" in report["messages"][0]


async def test_the_guard_sees_entries_in_the_reserved_slots_of_another_request(
    crowded: EngineActor,
) -> None:
    # Verification overwrites such entries too: neither the output nor the bytes afterwards tell.
    await speculate(crowded, 3)
    async with guarded(crowded) as report:
        await probe(crowded, "probe_swap_draft_slots")
        try:
            await generate(crowded, [[4, 5, 6], [7, 8, 9]], greedy(12))
        finally:
            await probe(crowded, "probe_take_swap_back")
    assert report["num_foreign_slots"] >= 1
    assert report["num_stray_slots"] == 0


async def test_blocks_in_the_prefix_cache_and_of_idle_requests_survive_speculation_beside_them(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    victim = stretched(random_prompts(1, seed=32)[0], 200)
    others = random_prompts(24, seed=33, longest=60)
    async with guarded(proof_engine, poison=True) as report:
        await speculate(proof_engine, 8)
        ((first,),) = await generate(proof_engine, [victim], greedy(40), name="victim")
        before = await probe(proof_engine, "probe_block_bytes", "victim")
        assert len(before) >= 2 * 7, "239 tokens in two layers"
        await generate(proof_engine, others, greedy(60), name="other")
        assert await probe(proof_engine, "probe_block_bytes", "victim") == before
        start = await probe(proof_engine, "probe_computed_positions")
        await speculate(proof_engine, 0)
        ((second,),) = await generate(proof_engine, [victim], greedy(40), name="again")
        computed = await probe(proof_engine, "probe_computed_positions") - start
        # Six blocks of 32 are found; the rest of the prompt and the new tokens are computed.
    assert computed == 200 - 6 * 32 + 39
    assert second.token_ids == first.token_ids
    assert judge_greedy(tiny_model, [victim], [first.token_ids]).num_wrong == 0
    assert report["num_stray_slots"] == 0


async def test_drafts_past_the_end_of_the_context_are_written_nowhere(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    # Alone, so that no other request's slots excuse a write; from a prompt that others may share.
    await speculate(proof_engine, 8)
    tokens = random_prompts(1, seed=36, longest=60)[0]
    async with guarded(proof_engine) as report:
        for room in range(1, 13):
            prompt = stretched(tokens, CONTEXT_LENGTH - room)
            ((sample,),) = await generate(proof_engine, [prompt], greedy(room), name=f"{room}")
            assert judge_greedy(tiny_model, [prompt], [sample.token_ids]).num_wrong == 0
    assert report["messages"] == []
    assert report["num_stray_slots"] == 0


async def kv_of_run(
    engine: EngineActor, prompts: list[list[int]], name: str, path: Path
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens and KV [layers, positions, elements] per prompt, in order."""
    groups = await generate(engine, prompts, greedy(60), name=name)
    await probe(engine, "probe_save_kv", str(path))
    saved: dict[str, Any] = torch.load(path)
    kv = []
    for index in range(len(prompts)):
        (found,) = [value for key, value in saved.items() if key.startswith(f"{name}-{index}-")]
        kv.append(found)
    return [group[0].token_ids for group in groups], kv


async def test_kv_after_speculation_is_the_kv_of_a_plain_run(
    proof_engine: EngineActor, tmp_path: Path
) -> None:
    prompts = random_prompts(30, seed=34, longest=60)
    async with guarded(proof_engine):
        await speculate(proof_engine, 0)
        plain_tokens, plain = await kv_of_run(proof_engine, prompts, "plain", tmp_path / "plain.pt")
        lengths = range(1, 9) if proof.IS_LONG else [8]
        largest, num_positions = 0.0, 0
        for length in lengths:
            await speculate(proof_engine, length)
            await forget_prefixes(proof_engine)  # every position is computed again
            name = f"drafted{length}"
            tokens, drafted = await kv_of_run(proof_engine, prompts, name, tmp_path / f"{name}.pt")
            assert tokens == plain_tokens
            for reference, found, prompt in zip(plain, drafted, prompts, strict=True):
                # Every token but the newest has been through the target.
                num_valid = len(prompt) + 60 - 1
                assert reference.shape[1] >= num_valid
                assert found.shape[1] >= num_valid
                difference = (reference[:, :num_valid] - found[:, :num_valid]).abs().max()
                largest = max(largest, float(difference))
                num_positions += num_valid
    assert largest < MAX_KV_DIFFERENCE
    proof.record(
        "kv_equality",
        "int8",
        draft_lengths=list(lengths),
        num_positions=num_positions,
        largest_difference=largest,
    )


async def test_an_abort_inside_a_draft_leaves_the_others_kv_alone(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    prompts = random_prompts(8, seed=35, longest=60)
    async with guarded(proof_engine, poison=True) as report:
        await speculate(proof_engine, 8)
        start = (await proof_engine.load())["num_generation_tokens"]
        doomed = asyncio.create_task(
            proof_engine.generate(
                GenerateRequest(
                    request_id="doomed", prompt_token_ids=[3, 4, 5], n=1, sampling=greedy(480)
                )
            )
        )
        staying = asyncio.create_task(generate(proof_engine, prompts, greedy(120), name="staying"))
        await wait_for_tokens(proof_engine, start + 100)
        await proof_engine.abort("doomed")
        (partial,) = (await doomed).samples
        groups = await staying
        late = await generate(proof_engine, prompts, greedy(40), name="late")
    assert partial.finish_reason == "abort"
    assert 0 < len(partial.token_ids) < 480
    outputs = [group[0].token_ids for group in groups]
    assert judge_greedy(tiny_model, prompts, outputs).num_wrong == 0
    assert [group[0].token_ids for group in late] == [tokens[:40] for tokens in outputs]
    assert judge_greedy(tiny_model, [[3, 4, 5]], [partial.token_ids]).num_wrong == 0
    assert report["num_stray_slots"] == 0
