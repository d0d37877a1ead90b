"""What the plugin changes in vLLM, at the level of a running engine.

Tied heads: ``test_weight_push_engine.py``; experts: ``test_architectures.py``. The first test says
that verification does not need the kernel's repair. Each other one was seen failing without what it
is about: ``plain_steps.py``, and the renewal of the prefix cache's key for waiting requests
(``set_weight_versions``) and for preempted ones (``_preempt_request``).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from rollout_server.engine.actor import EngineActor
from shared.schemas.rollouts import SamplingOptions
from tests.support import proof
from tests.support.engine import (
    generate,
    greedy,
    probe,
    push,
    running_engine,
    speculate,
    wait_for_tokens,
)
from tests.support.judge import behaviour_logprobs, completion_logits, judge_greedy
from tests.support.models import logprob_reference, make_model, random_prompts, stretched
from tests.support.statistics import exact_p_value

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

SIGNIFICANCE = 1e-5


async def p_value_of_samples(engine: EngineActor, model: Path, name: str) -> float:
    """Of 128 sequences of 16 tokens at temperature 0.7 against Hugging Face's probabilities."""
    sampling = SamplingOptions(temperature=0.7, max_tokens=16, ignore_eos=True)
    prompts = random_prompts(32, seed=81)
    groups = await generate(engine, prompts, sampling, n=4, name=name)
    pairs = [(p, s.token_ids) for p, group in zip(prompts, groups, strict=True) for s in group]
    logits = completion_logits(model, [p for p, _ in pairs], [tokens for _, tokens in pairs])
    probabilities = np.stack(
        [
            behaviour_logprobs(scores_TV, prompt, tokens, sampling).exp().numpy()
            for scores_TV, (prompt, tokens) in zip(logits, pairs, strict=True)
        ]
    )
    return exact_p_value([tokens for _, tokens in pairs], probabilities)


async def test_sampling_is_right_with_or_without_the_repaired_kernel(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    # vLLM's rejection sampler is wrong without the repair; verification of our own does not use it.
    await speculate(proof_engine, 3)
    assert await p_value_of_samples(proof_engine, tiny_model, "repaired") > SIGNIFICANCE
    await probe(proof_engine, "probe_undo_kernel_repair", True)
    try:
        assert await p_value_of_samples(proof_engine, tiny_model, "stock") > SIGNIFICANCE
    finally:
        await probe(proof_engine, "probe_undo_kernel_repair", False)


async def test_steps_without_drafts_call_nothing_that_only_drafts_need(
    proof_engine: EngineActor,
) -> None:
    sampling = SamplingOptions(temperature=1.0, max_tokens=24, ignore_eos=True)
    await speculate(proof_engine, 0)
    await generate(proof_engine, random_prompts(1, seed=82), sampling, name="settles")
    await probe(proof_engine, "probe_count_calls")
    await generate(proof_engine, random_prompts(6, seed=82), sampling, name="idle")
    assert await probe(proof_engine, "probe_calls") == {}
    await speculate(proof_engine, 3)
    await generate(proof_engine, random_prompts(6, seed=82), sampling, name="busy")
    calls = await probe(proof_engine, "probe_calls")
    # Drafts come with the step's output: nobody asks the worker for them.
    assert set(calls) == {"verify", "propose", "prepare_next_token_ids_padded"}


@pytest.mark.parametrize("length", [0, 4] if proof.IS_LONG else [4])
async def test_requests_that_waited_through_a_push_find_no_kv_of_the_old_weights(
    tmp_path: Path, length: int
) -> None:
    old, new = (make_model(tmp_path / f"v{v}", seed=90 + v) for v in range(2))
    cached = (random_prompts(1, seed=83, longest=10)[0] * 200)[:160]
    async with running_engine(old, engine={"max_num_seqs": 1}) as engine:
        await speculate(engine, length)
        ((before,),) = await generate(engine, [cached], greedy(8), name="fills the cache")
        start = (await engine.load())["num_generation_tokens"]
        running = asyncio.create_task(generate(engine, [[3, 4, 5]], greedy(300), name="running"))
        await wait_for_tokens(engine, start + 20)
        waiting = asyncio.create_task(generate(engine, [cached], greedy(24), name="waiting"))
        while (await engine.load())["num_waiting_reqs"] == 0:  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0)
        await push(engine, new, 1, tmp_path)
        assert (await engine.load())["num_waiting_reqs"] == 1
        ((after,),) = await waiting
        await running
    assert judge_greedy(old, [cached], [before.token_ids]).num_wrong == 0
    assert judge_greedy(new, [cached], [after.token_ids]).num_wrong == 0
    # A tiny model's choice may survive a stale prefix; its probabilities do not.
    expected = logprob_reference(new, cached, after.token_ids, 1.0)
    assert after.logprobs == pytest.approx(expected, abs=1e-4)


async def test_requests_preempted_after_a_push_are_computed_anew_under_the_new_weights(
    tmp_path: Path,
) -> None:
    # Two sequences grow until they no longer fit, after a push in their middle. The second gives
    # way; the first takes five of its blocks at most, from its end, so the prefix cache still
    # holds what the second had computed first: under the old weights.
    old, new = (make_model(tmp_path / f"v{v}", seed=95 + v) for v in range(2))
    prompts = [stretched(prompt, 64) for prompt in random_prompts(2, seed=84)]
    async with running_engine(old, engine={"num_kv_blocks": 18, "max_num_seqs": 2}) as engine:
        await speculate(engine, 4)
        start = (await engine.load())["num_generation_tokens"]
        running = asyncio.create_task(generate(engine, prompts, greedy(300), name="running"))
        await wait_for_tokens(engine, start + 2 * 20)
        await push(engine, new, 1, tmp_path)
        assert (await engine.load())["num_preemptions"] == 0
        groups = await running
        assert (await engine.load())["num_preemptions"] >= 1
    # The preempted sequence continues as the new weights alone would have it: its last tokens have
    # their logprobs. The other one keeps KV of the old weights, and has not.
    all_new = []
    for prompt, (sample,) in zip(prompts, groups, strict=True):
        expected = logprob_reference(new, prompt, sample.token_ids, 1.0)[-20:]
        all_new.append(sample.logprobs[-20:] == pytest.approx(expected, abs=1e-4))
    assert sorted(all_new) == [False, True]
