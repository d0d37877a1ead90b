"""Verification gives exactly the target's distribution, whatever was proposed.

Thousands of identical requests are verified in one call, so that counts can be held against the
probabilities themselves. Needs vLLM's types and kernels, no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

vllm = pytest.importorskip("vllm")
from vllm.v1.sample.logits_processor import LogitsProcessors  # noqa: E402
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402

from rollout_server.drafter.draft_sampling import DraftSampler  # noqa: E402
from rollout_server.drafter.proposal import Proposal, ProposalBuffer  # noqa: E402
from rollout_server.drafter.verification import NO_TOKEN, verify  # noqa: E402

VOCAB_SIZE = 6
NUM_REQUESTS = 15_000
NUM_DRAFTS = 2
SIGNIFICANCE = 1e-5

pytestmark = pytest.mark.slow


def sampling(
    num_requests: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    logprobs: int | None = None,
    generators: dict[int, torch.Generator] | None = None,
) -> SamplingMetadata:
    """Sampling parameters of a batch; the prompt is token 0, the output so far token 1."""
    temperatures = torch.as_tensor(temperature, dtype=torch.float32).expand(num_requests)
    is_greedy = temperatures == 0
    ones = torch.ones(num_requests)
    return SamplingMetadata(
        temperature=None if is_greedy.all() else temperatures.clone(),
        all_greedy=bool(is_greedy.all()),
        all_random=not bool(is_greedy.any()),
        top_p=None,
        top_k=None if top_k is None else torch.full((num_requests,), top_k, dtype=torch.int32),
        generators=generators or {},
        max_num_logprobs=logprobs,
        no_penalties=repetition_penalty is None,
        prompt_token_ids=torch.zeros(num_requests, 1, dtype=torch.int64),
        frequency_penalties=ones * 0,
        presence_penalties=ones * 0,
        repetition_penalties=ones * (repetition_penalty or 1.0),
        output_token_ids=[[1]] * num_requests,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=[[] for _ in range(num_requests)],
    )


def names(count: int) -> list[str]:
    return [f"r{index}" for index in range(count)]


def random_logits(seed: int) -> torch.Tensor:
    """[NUM_DRAFTS + 1, V]: one row per position, the same whatever came before."""
    return torch.randn(NUM_DRAFTS + 1, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def propose(
    draft_logits: torch.Tensor, metadata: SamplingMetadata
) -> tuple[torch.Tensor, Proposal]:
    """Drafts [NUM_REQUESTS, NUM_DRAFTS] drawn the way the proposer draws them."""
    sampler = DraftSampler(
        metadata,
        ProposalBuffer(VOCAB_SIZE, torch.device("cpu")),
        num_drafts=NUM_DRAFTS,
        batch_size=NUM_REQUESTS,
        vocab_size=VOCAB_SIZE,
        sampled_token_ids_BJ=None,
    )
    drafts = [
        sampler.sample(index, draft_logits[index].expand(NUM_REQUESTS, -1).clone())
        for index in range(NUM_DRAFTS)
    ]
    return torch.stack(drafts, dim=1), sampler.proposal(names(NUM_REQUESTS))


def verified(
    target_logits: torch.Tensor,
    drafts: torch.Tensor,
    metadata: SamplingMetadata,
    proposal: Proposal | None,
    num_drafts: Sequence[int] | None = None,
) -> np.ndarray[Any, Any]:
    """Token ids [NUM_REQUESTS, N + 1]."""
    counts = list(num_drafts or [NUM_DRAFTS] * NUM_REQUESTS)
    rows = torch.cat([target_logits[: count + 1] for count in counts])
    flat = torch.cat([drafts[index, :count] for index, count in enumerate(counts)])
    output = verify(rows, flat, counts, metadata, proposal, names(len(counts)))
    return output.sampled_token_ids.numpy()


def p_value(tokens: np.ndarray[Any, Any], probabilities: torch.Tensor) -> float:
    """Of token counts against probabilities, impossible tokens excluded."""
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)
    possible = probabilities.numpy() > 0
    assert counts[~possible].sum() == 0
    expected = probabilities.numpy()[possible].astype(np.float64)
    return float(chisquare(counts[possible], expected / expected.sum() * counts.sum()).pvalue)


def smallest_p_value(tokens: np.ndarray[Any, Any], target: torch.Tensor) -> float:
    """Over all positions; position j is there only where j drafts before it were accepted."""
    return min(
        p_value(tokens[tokens[:, position] != NO_TOKEN, position], target[position])
        for position in range(NUM_DRAFTS + 1)
    )


@pytest.mark.parametrize("known", ["all", "none", "half"])
def test_tokens_have_the_targets_distribution(known: str) -> None:
    metadata = sampling(NUM_REQUESTS)
    target, draft = random_logits(1), random_logits(2)
    drafts, proposal = propose(draft, metadata)
    if known == "half":
        half = NUM_REQUESTS // 2
        assert proposal.probabilities_KBV is not None
        proposal = Proposal(names(half), proposal.probabilities_KBV[:, :half].contiguous())
    tokens = verified(target, drafts, metadata, None if known == "none" else proposal)
    assert smallest_p_value(tokens, target.softmax(-1)) > SIGNIFICANCE
    num_tokens = (tokens != NO_TOKEN).sum(axis=1)
    assert set(num_tokens.tolist()) == {1, 2, 3}, "drafts are accepted, rejected and exhausted"


def test_a_proposal_that_lies_about_its_distribution_is_noticed() -> None:
    metadata = sampling(NUM_REQUESTS)
    target = random_logits(1)
    drafts, proposal = propose(random_logits(2), metadata)
    assert proposal.probabilities_KBV is not None
    lie = Proposal(proposal.request_ids, proposal.probabilities_KBV.pow(0.8))
    tokens = verified(target, drafts, metadata, lie)
    assert smallest_p_value(tokens, target.softmax(-1)) < SIGNIFICANCE


def test_the_targets_own_distribution_is_accepted_always() -> None:
    metadata = sampling(NUM_REQUESTS)
    target = random_logits(1)
    drafts, proposal = propose(target, metadata)
    tokens = verified(target, drafts, metadata, proposal)
    assert (tokens != NO_TOKEN).all()
    assert smallest_p_value(tokens, target.softmax(-1)) > SIGNIFICANCE


def test_temperature_top_k_and_penalties_shape_drafts_and_target_alike() -> None:
    metadata = sampling(NUM_REQUESTS, temperature=0.7, top_k=3, repetition_penalty=1.5)
    target = random_logits(1)
    drafts, proposal = propose(target, metadata)
    tokens = verified(target, drafts, metadata, proposal)
    assert (tokens != NO_TOKEN).all(), "an identical drafter shapes its drafts as the target does"

    def shaped(row: torch.Tensor, seen: set[int]) -> torch.Tensor:
        logits = row.clone()
        for token in seen:
            logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        logits /= 0.7
        logits[logits < logits.topk(3).values[-1]] = float("-inf")
        return logits.softmax(-1)

    assert p_value(tokens[:, 0], shaped(target[0], {0, 1})) > SIGNIFICANCE
    for first in range(VOCAB_SIZE):
        second = tokens[tokens[:, 0] == first, 1]
        if len(second) > 250:
            assert p_value(second, shaped(target[1], {0, 1, first})) > SIGNIFICANCE


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    temperatures = [0.0, 1.0] * (NUM_REQUESTS // 2)
    metadata = sampling(NUM_REQUESTS, temperature=temperatures)
    target, draft = random_logits(1), random_logits(2)
    drafts, proposal = propose(draft, metadata)
    tokens = verified(target, drafts, metadata, proposal)
    assert smallest_p_value(tokens[1::2], target.softmax(-1)) > SIGNIFICANCE
    likeliest = target.argmax(-1).tolist()
    proposed = draft.argmax(-1).tolist()
    expected = []
    for position in range(NUM_DRAFTS + 1):
        expected.append(likeliest[position])
        if position < NUM_DRAFTS and proposed[position] != likeliest[position]:
            break
    padded = expected + [NO_TOKEN] * (NUM_DRAFTS + 1 - len(expected))
    assert (tokens[0::2] == padded).all()


def test_requests_may_have_fewer_drafts_than_others_or_none() -> None:
    metadata = sampling(NUM_REQUESTS)
    target, draft = random_logits(1), random_logits(2)
    drafts, proposal = propose(draft, metadata)
    counts = [index % 3 for index in range(NUM_REQUESTS)]
    tokens = verified(target, drafts, metadata, proposal, counts)
    assert smallest_p_value(tokens, target.softmax(-1)) > SIGNIFICANCE
    assert ((tokens != NO_TOKEN).sum(axis=1) <= np.array(counts) + 1).all()
    assert (tokens[0::3, 1:] == NO_TOKEN).all()


def test_logprobs_are_the_targets_at_every_returned_token() -> None:
    metadata = sampling(NUM_REQUESTS, temperature=0.7, logprobs=0)
    target = random_logits(1)
    drafts, proposal = propose(random_logits(2), metadata)
    counts = [1 + index % 2 for index in range(NUM_REQUESTS)]
    rows = torch.cat([target[: count + 1] for count in counts])
    flat = torch.cat([drafts[index, :count] for index, count in enumerate(counts)])
    output = verify(rows, flat, counts, metadata, proposal, names(NUM_REQUESTS))
    assert output.logprobs_tensors is not None
    tokens = output.sampled_token_ids.flatten()
    there = tokens != NO_TOKEN
    position = torch.arange(NUM_DRAFTS + 1).repeat(NUM_REQUESTS)
    expected = (target / 0.7).log_softmax(-1)[position[there], tokens[there].long()]
    torch.testing.assert_close(output.logprobs_tensors.logprobs[there, 0], expected)
    assert torch.equal(output.logprobs_tensors.logprob_token_ids[there, 0], tokens[there])


def test_the_same_seed_gives_the_same_tokens() -> None:
    outcomes = []
    for _ in range(2):
        generators = {index: torch.Generator().manual_seed(index) for index in range(64)}
        metadata = sampling(NUM_REQUESTS, generators=generators)
        drafts, proposal = propose(random_logits(2), metadata)
        outcomes.append(verified(random_logits(1), drafts, metadata, proposal)[:64])
    assert (outcomes[0] == outcomes[1]).all()
