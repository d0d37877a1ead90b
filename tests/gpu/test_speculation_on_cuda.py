"""Losslessness and graphs of an engine on CUDA."""

from __future__ import annotations

import pytest

from rollout_server.engine.protocol import GeneratedSample
from tests.gpu.scenario import MAX_DRAFT_LENGTH, REPLAYED_BATCHES, EngineOutputs
from tests.support.statistics import smallest_p_value

pytestmark = pytest.mark.gpu

TIE = 1e-3
"""Log-probabilities closer than this are a tie: float32 matrix products may go through TF32 in
attention, and verification runs more rows than plain decoding."""
MIN_EQUAL_FRACTION = 0.9
SIGNIFICANCE = 0.001


@pytest.mark.parametrize("length", range(1, MAX_DRAFT_LENGTH + 1))
def test_greedy_output_with_drafts_equals_plain_output(outputs: EngineOutputs, length: int) -> None:
    check_equal(outputs.greedy[0], outputs.greedy[length])


def test_captured_graphs_follow_pushed_weights(outputs: EngineOutputs) -> None:
    assert [s.token_ids for s in outputs.after_push[0]] != [s.token_ids for s in outputs.greedy[0]]
    check_equal(outputs.after_push[0], outputs.after_push[3])
    # A drafter left behind would hardly ever guess another model's tokens.
    assert acceptance(outputs.after_push[3]) > 0.5 * acceptance(outputs.greedy[3])


def acceptance(samples: list[GeneratedSample]) -> float:
    """Accepted drafts over drafts."""
    num_drafted = sum(sample.num_draft_tokens for sample in samples)
    return sum(sample.num_accepted_tokens for sample in samples) / num_drafted


def check_equal(plain_samples: list[GeneratedSample], samples: list[GeneratedSample]) -> None:
    """The same tokens but for ties, from drafts of which some were accepted and some not."""
    pairs = list(zip(plain_samples, samples, strict=True))
    num_equal = sum(plain.token_ids == drafted.token_ids for plain, drafted in pairs)
    assert num_equal >= MIN_EQUAL_FRACTION * len(pairs)
    for plain, drafted in pairs:
        assert first_difference_is_a_tie(plain, drafted)
    num_drafted = sum(sample.num_draft_tokens for _, sample in pairs)
    num_accepted = sum(sample.num_accepted_tokens for _, sample in pairs)
    assert 0 < num_accepted < num_drafted, "both accepted and rejected drafts must occur"


def first_difference_is_a_tie(plain: GeneratedSample, drafted: GeneratedSample) -> bool:
    """Up to the first difference both stand on the same text, so their logprobs compare."""
    for index, (left, right) in enumerate(zip(plain.token_ids, drafted.token_ids, strict=True)):
        if left != right:
            return abs(plain.logprobs[index] - drafted.logprobs[index]) < TIE
    return True


def test_sampled_output_with_drafts_has_the_distribution_of_plain_output(
    outputs: EngineOutputs,
) -> None:
    assert smallest_p_value(outputs.sampled[0], outputs.sampled[3]) > SIGNIFICANCE


def test_replayed_loops_draw_new_random_numbers_each_time(outputs: EngineOutputs) -> None:
    sequences = [tuple(sequence) for sequence in outputs.sampled[3]]
    assert len(set(sequences)) > len(sequences) // 2


def test_a_seed_gives_the_same_tokens_again(outputs: EngineOutputs) -> None:
    assert outputs.seeded["first"] == outputs.seeded["second"]


def test_loops_and_verification_steps_are_captured(outputs: EngineOutputs) -> None:
    # Batch sizes 1, 2, 4, ..., 64 for each draft length.
    assert outputs.graphs["draft_loops"] == 7 * MAX_DRAFT_LENGTH
    # At the least, one and several requests for each query length.
    assert outputs.graphs["target_full"] >= 2 * (MAX_DRAFT_LENGTH + 1)


@pytest.mark.parametrize(("batch", "rows"), REPLAYED_BATCHES)
@pytest.mark.parametrize("length", range(1, MAX_DRAFT_LENGTH + 1))
def test_a_replayed_loop_drafts_what_the_uncaptured_loop_drafts(
    outputs: EngineOutputs, batch: int, rows: int, length: int
) -> None:
    replayed, uncaptured = outputs.replayed[batch, rows, length]
    assert len(replayed) == rows
    assert replayed == uncaptured


def test_requantization_keeps_every_address(outputs: EngineOutputs) -> None:
    before, after = outputs.addresses
    assert before
    assert before == after
