"""Sampled tokens have the target's distribution, whatever is drafted; and the tests can fail.

Two judges: chi-square of two engines' tokens, pairs and triples at every position
(``smallest_p_value``), and all tokens against Hugging Face's probabilities (``exact_p_value``).
Long form (``PROOF=1``): 102,400 tokens a side, every setting, off, on and switching.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_server.engine.actor import EngineActor
from shared.schemas.rollouts import SamplingOptions
from tests.support import proof
from tests.support.engine import (
    changing_draft_length,
    generate,
    probe,
    speculate,
)
from tests.support.judge import behaviour_logprobs, completion_logits, support_is_blurred
from tests.support.statistics import exact_p_value, smallest_p_value, with_planted_error

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

NUM_SEQUENCES = 6400 if proof.IS_LONG else 1600
SEQUENCE_TOKENS = 16
GROUP = 10
PROMPT = [5, 9, 4, 7, 3] * 4
SIGNIFICANCE = 1e-5
"""A sound engine falls below it once in some thousand runs of this file."""
PLANTED_RATE = 0.02
PLANTED_TOKEN = 20

EVERYTHING = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}
SETTINGS: dict[str, dict[str, Any]] = {
    "all at once": EVERYTHING,
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 20": {"top_k": 20},
    "top-k 5": {"top_k": 5},
    "repetition penalty 1.3": {"repetition_penalty": 1.3},
    "presence and frequency penalty": {"presence_penalty": 0.6, "frequency_penalty": 0.4},
    "min-p 0.1": {"min_p": 0.1},
    "logit bias": {"logit_bias": {"7": 2.0, "11": -3.0}},
}
SHORT = ["all at once", "min-p 0.1", "logit bias"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One side's samples of ``PROMPT``."""

    sequences: list[list[int]]
    exact_p_value: float
    num_set_aside: int
    """Tokens ``exact_p_value`` says nothing about."""
    accepted_of_drafted: float


def probabilities(
    model: Path, sequences: list[list[int]], sampling: SamplingOptions
) -> tuple[np.ndarray, int]:
    """Hugging Face's, of every token given those before it: [sequences, tokens, vocabulary].

    Where rounding decides which tokens are left to draw from, the token drawn is taken for certain,
    and so counts neither for nor against the engine. How many these are comes second.
    """
    prompts = [PROMPT] * len(sequences)
    rows = []
    num_set_aside = 0
    for scores_TV, tokens in zip(
        completion_logits(model, prompts, sequences), sequences, strict=True
    ):
        rows.append(behaviour_logprobs(scores_TV, PROMPT, tokens, sampling).exp().numpy())
        blurred_T = support_is_blurred(scores_TV, PROMPT, tokens, sampling).numpy()
        rows[-1][blurred_T] = np.eye(scores_TV.shape[1])[np.array(tokens)[blurred_T]]
        num_set_aside += int(blurred_T.sum())
    return np.stack(rows), num_set_aside


async def sample(
    engine: EngineActor, model: Path, name: str, setting: dict[str, Any], *, seeded: bool = False
) -> Sampled:
    """``NUM_SEQUENCES`` independent continuations of ``PROMPT``."""
    before = await engine.speculation(0)
    sampling = SamplingOptions.model_validate(
        {**setting, "max_tokens": SEQUENCE_TOKENS, "ignore_eos": True}
    )
    sequences: list[list[int]] = []
    if seeded:
        options = [
            sampling.model_copy(update={"seed": GROUP * index})
            for index in range(NUM_SEQUENCES // GROUP)
        ]
        groups = await asyncio.gather(
            *(
                generate(engine, [PROMPT], option, n=GROUP, name=f"{name}-{option.seed}")
                for option in options
            )
        )
        sequences += [item.token_ids for (group,) in groups for item in group]
    else:
        prompts = [PROMPT] * (NUM_SEQUENCES // GROUP)
        for group in await generate(engine, prompts, sampling, n=GROUP, name=name):
            sequences += [item.token_ids for item in group]
    assert len(sequences) == NUM_SEQUENCES
    after = await engine.speculation(0)
    drafted = after.num_draft_tokens - before.num_draft_tokens
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    exact, num_set_aside = probabilities(model, sequences, sampling)
    return Sampled(
        sequences=sequences,
        exact_p_value=exact_p_value(sequences, exact),
        num_set_aside=num_set_aside,
        accepted_of_drafted=accepted / drafted if drafted else 0.0,
    )


@pytest.mark.parametrize("name", SETTINGS if proof.IS_LONG else SHORT)
async def test_tokens_pairs_and_triples_are_distributed_alike_off_on_and_switching(
    proof_engine: EngineActor, tiny_model: Path, name: str
) -> None:
    setting = SETTINGS[name]
    await speculate(proof_engine, 0)
    off = await sample(proof_engine, tiny_model, "off", setting)
    await speculate(proof_engine, 3)
    on = await sample(proof_engine, tiny_model, "on", setting)
    before = await proof_engine.speculation(0)
    async with changing_draft_length(proof_engine, [0, 1, 5, 0, 8, 3]):
        switching = await sample(proof_engine, tiny_model, "switching", setting)
    num_switches = (await proof_engine.speculation(0)).num_switches - before.num_switches
    assert NUM_SEQUENCES * SEQUENCE_TOKENS >= 20_000
    assert off.accepted_of_drafted == 0.0
    assert 0.0 < on.accepted_of_drafted < 1.0
    assert num_switches >= 8, "on and off many times within the samples"
    p_values = {
        "off against Hugging Face": off.exact_p_value,
        "on against Hugging Face": on.exact_p_value,
        "switching against Hugging Face": switching.exact_p_value,
        "on against off": smallest_p_value(off.sequences, on.sequences),
        "switching against off": smallest_p_value(off.sequences, switching.sequences),
    }
    proof.record(
        "distribution",
        name,
        num_tokens_a_side=NUM_SEQUENCES * SEQUENCE_TOKENS,
        p_values=p_values,
        num_set_aside=max(side.num_set_aside for side in (off, on, switching)),
        accepted_of_drafted=on.accepted_of_drafted,
        num_switches=num_switches,
    )
    assert min(p_values.values()) > SIGNIFICANCE, p_values


async def test_seeded_requests_have_the_same_distribution(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    # Noise of one seed used twice, in drafting and in verifying, would bias every token.
    await speculate(proof_engine, 4)
    seeded = await sample(proof_engine, tiny_model, "seeded", {"temperature": 1.0}, seeded=True)
    proof.record(
        "distribution",
        "temperature 1, a seed of its own per request",
        num_tokens_a_side=NUM_SEQUENCES * SEQUENCE_TOKENS,
        num_set_aside=seeded.num_set_aside,
        p_values={"on against Hugging Face": seeded.exact_p_value},
        accepted_of_drafted=seeded.accepted_of_drafted,
    )
    assert seeded.exact_p_value > SIGNIFICANCE


@contextlib.asynccontextmanager
async def planted(engine: EngineActor, error: str) -> AsyncIterator[None]:
    """The engine makes an error inside (a blunt drafter is none); afterwards it does not."""
    if error == "mixture":
        await probe(engine, "probe_mix_in_token", PLANTED_TOKEN, PLANTED_RATE)
    else:
        await probe(engine, "probe_blunt_drafter", True)
        await probe(engine, "probe_drop_residual", error == "dropped residual")
    try:
        yield
    finally:
        if error == "mixture":
            await probe(engine, "probe_take_mixture_back")
        else:
            await probe(engine, "probe_drop_residual", False)
            await probe(engine, "probe_blunt_drafter", False)


async def test_a_blunt_drafter_is_no_error(proof_engine: EngineActor, tiny_model: Path) -> None:
    # Every other draft is rejected: the distribution is what verification makes of them.
    await speculate(proof_engine, 3)
    async with planted(proof_engine, "blunt drafter"):
        blunt = await sample(proof_engine, tiny_model, "blunt", {})
    proof.record(
        "distribution",
        "temperature 1, drafter of twice the temperature",
        num_tokens_a_side=NUM_SEQUENCES * SEQUENCE_TOKENS,
        num_set_aside=blunt.num_set_aside,
        p_values={"on against Hugging Face": blunt.exact_p_value},
        accepted_of_drafted=blunt.accepted_of_drafted,
    )
    assert blunt.accepted_of_drafted < 0.85
    assert blunt.exact_p_value > SIGNIFICANCE


@pytest.mark.parametrize("error", ["mixture", "dropped residual"])
async def test_an_error_planted_in_the_engine_is_detected(
    proof_engine: EngineActor, tiny_model: Path, error: str
) -> None:
    await speculate(proof_engine, 3)
    right = await sample(proof_engine, tiny_model, "right", {})
    async with planted(proof_engine, error):
        wrong = await sample(proof_engine, tiny_model, "wrong", {})
    p_values = {
        "right against Hugging Face": right.exact_p_value,
        "wrong against Hugging Face": wrong.exact_p_value,
        "wrong against right": smallest_p_value(right.sequences, wrong.sequences),
    }
    proof.record(
        "planted_errors",
        error,
        num_tokens_a_side=NUM_SEQUENCES * SEQUENCE_TOKENS,
        p_values=p_values,
        power=power(right.sequences) if error == "mixture" and proof.IS_LONG else None,
    )
    assert right.exact_p_value > SIGNIFICANCE
    assert wrong.exact_p_value < SIGNIFICANCE, p_values
    if proof.IS_LONG:
        assert p_values["wrong against right"] < SIGNIFICANCE, p_values


def power(sequences: list[list[int]], num_trials: int = 20) -> float:
    """Share of trials in which two resampled sides, one with a planted error of 2 %, differ."""
    generator = np.random.default_rng(0)
    detected = 0
    for trial in range(num_trials):
        left, right = (
            [sequences[index] for index in generator.integers(len(sequences), size=len(sequences))]
            for _ in range(2)
        )
        wrong = with_planted_error(right, token=PLANTED_TOKEN, rate=PLANTED_RATE, seed=trial)
        detected += smallest_p_value(left, wrong) < SIGNIFICANCE
    return detected / num_trials
