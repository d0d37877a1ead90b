"""Every returned logprob is Hugging Face's, of accepted, recovered and bonus tokens alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_server.engine.actor import EngineActor
from shared.schemas.rollouts import SamplingOptions
from tests.support import proof
from tests.support.engine import generate, running_engine, speculate
from tests.support.judge import (
    LOGIT_TOLERANCE,
    NUCLEUS_TOLERANCE,
    behaviour_logprobs,
    completion_logits,
    support_is_blurred,
)
from tests.support.models import make_model, random_prompts
from tests.support.proof_models import SelfDrafting

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

MAX_DIFFERENCE = 1e-4
DRAFT_LENGTH = 4
NUM_TOKENS = 48
NUM_PROMPTS = 32 if proof.IS_LONG else 8
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "top-k 20": {"top_k": 20},
    "top-k 5, top-p 0.8": {"top_k": 5, "top_p": 0.8},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "min-p 0.1": {"min_p": 0.1},
    "logit bias": {"logit_bias": {"7": 2.0, "11": -3.0}},
}


async def differences(
    engine: EngineActor, model: Path, setting: dict[str, Any], name: str
) -> torch.Tensor:
    """|returned - recomputed| of every sampled token.

    Where rounding decides whether a token is inside of min-p or top-p, either answer is right: the
    distance is to the nearer of the two, with the token in and with it out.
    """
    sampling = SamplingOptions.model_validate(
        {**setting, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    )
    prompts = random_prompts(NUM_PROMPTS, seed=61)
    groups = await generate(engine, prompts, sampling, n=2, name=name)
    pairs = [(p, s) for p, group in zip(prompts, groups, strict=True) for s in group]
    logits = completion_logits(model, [p for p, _ in pairs], [s.token_ids for _, s in pairs])
    found = []
    for (prompt, sample), scores_TV in zip(pairs, logits, strict=True):
        assert len(sample.logprobs) == len(sample.token_ids) == NUM_TOKENS
        token_ids_T1 = torch.tensor(sample.token_ids)[:, None]
        blurred_T = support_is_blurred(scores_TV, prompt, sample.token_ids, sampling)
        readings = []
        for reading in (sampling, *on_both_sides_of_the_edge(sampling)):
            expected_TV = behaviour_logprobs(scores_TV, prompt, sample.token_ids, reading)
            expected_T = expected_TV.gather(1, token_ids_T1)[:, 0]
            readings.append((expected_T - torch.tensor(sample.logprobs)).abs())
        nearest_T = torch.stack(readings).amin(dim=0)
        found.append(torch.where(blurred_T, nearest_T, readings[0]))
    return torch.cat(found)


def on_both_sides_of_the_edge(sampling: SamplingOptions) -> list[SamplingOptions]:
    """The same options with what is left by rounding only taken in, and left out."""
    readings = []
    for sign in (-1, 1):
        changes: dict[str, float] = {}
        if sampling.min_p:
            changes["min_p"] = sampling.min_p * (1 + sign * 2 * LOGIT_TOLERANCE)
        if sampling.top_p < 1.0:
            changes["top_p"] = sampling.top_p + sign * 2 * NUCLEUS_TOLERANCE
        if changes:
            readings.append(sampling.model_copy(update=changes))
    return readings


async def check_every_kind_of_token(
    engine: EngineActor, model: Path, name: str, *, is_exact_drafter: bool = False
) -> None:
    await speculate(engine, DRAFT_LENGTH)
    before = await engine.speculation(0)
    largest = {}
    for setting_name, setting in SETTINGS.items():
        values = await differences(engine, model, setting, setting_name)
        largest[setting_name] = float(values.max())
    after = await engine.speculation(0)
    num_drafts = after.num_drafts - before.num_drafts
    bonus = (
        after.num_accepted_tokens_per_pos[DRAFT_LENGTH - 1]
        - before.num_accepted_tokens_per_pos[DRAFT_LENGTH - 1]
    )
    kinds = {
        "accepted": after.num_accepted_tokens - before.num_accepted_tokens,
        "bonus": bonus,
        # Also the last cycle of a sequence that max_tokens left no room for all drafts.
        "recovered": num_drafts - bonus,
    }
    num_sequences = 2 * NUM_PROMPTS * len(SETTINGS)
    proof.record("logprobs", name, largest_difference=largest, tokens=kinds)
    assert max(largest.values()) < MAX_DIFFERENCE, largest
    assert kinds["accepted"] > 0
    assert kinds["bonus"] > 0
    assert kinds["recovered"] > num_sequences or is_exact_drafter


async def test_logprobs_are_hugging_faces_for_every_kind_of_token(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    await check_every_kind_of_token(proof_engine, tiny_model, "qwen3-tiny int8, drafts up to 8")


@pytest.mark.skipif(not proof.IS_LONG, reason="the long form: PROOF=1")
async def test_logprobs_are_hugging_faces_for_every_scheme_and_architecture(
    self_drafting: SelfDrafting,
) -> None:
    await check_every_kind_of_token(
        self_drafting.engine,
        self_drafting.model,
        self_drafting.name,
        is_exact_drafter=self_drafting.is_exact_drafter,
    )


@pytest.mark.skipif(not proof.IS_LONG, reason="a figure for the report: PROOF=1")
async def test_bfloat16_differs_no_more_with_speculation_than_without(tmp_path: Path) -> None:
    model = make_model(tmp_path, seed=0, dtype=torch.bfloat16)
    figures = {}
    async with running_engine(model, dtype="bfloat16") as engine:
        for length in (0, DRAFT_LENGTH):
            await speculate(engine, length)
            values = await differences(engine, model, {}, f"k{length}")
            figures[str(length)] = {"mean": float(values.mean()), "largest": float(values.max())}
    proof.record("logprobs_bfloat16", "int8", by_draft_length=figures)
    assert figures[str(DRAFT_LENGTH)]["mean"] < 1.5 * figures["0"]["mean"]
