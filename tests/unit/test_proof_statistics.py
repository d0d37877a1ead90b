"""The statistical tests of the proof: right samples pass, wrong ones do not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.statistics import exact_p_value, smallest_p_value, with_planted_error

VOCAB_SIZE = 8
LENGTH = 6
SIGNIFICANCE = 0.001


def chain_probabilities(previous_N: np.ndarray) -> np.ndarray:
    """A distribution that depends on the token before: [N, vocabulary]."""
    logits = np.cos(np.arange(VOCAB_SIZE)[None, :] * (previous_N[:, None] + 1.3) * 0.7)
    weights = np.exp(1.5 * logits)
    return weights / weights.sum(axis=1, keepdims=True)


def draw(
    num_sequences: int, seed: int, *, wrong: float = 0.0
) -> tuple[list[list[int]], np.ndarray]:
    """Sequences of the chain and the right probabilities of every token.

    Args:
        wrong: share of every token's distribution that is moved to token 2.
    """
    generator = np.random.default_rng(seed)
    previous = np.zeros(num_sequences, dtype=int)
    tokens, probabilities = [], []
    for _ in range(LENGTH):
        right = chain_probabilities(previous)
        probabilities.append(right)
        used = (1 - wrong) * right
        used[:, 2] += wrong
        uniform = generator.random((num_sequences, 1))
        previous = (used.cumsum(axis=1) < uniform).sum(axis=1).clip(max=VOCAB_SIZE - 1)
        tokens.append(previous)
    return np.stack(tokens, axis=1).tolist(), np.stack(probabilities, axis=1)


def test_samples_of_the_right_distribution_pass_about_as_often_as_they_should() -> None:
    p_values = []
    for seed in range(60):
        sequences, probabilities = draw(300, seed)
        p_values.append(exact_p_value(sequences, probabilities))
    assert min(p_values) > SIGNIFICANCE
    # Bonferroni over two dependent statistics: no more than a tenth below a tenth, give or take.
    assert sum(p < 0.1 for p in p_values) <= 12


@pytest.mark.parametrize("seed", range(4))
def test_two_percent_moved_to_one_token_are_seen_by_both_tests(seed: int) -> None:
    right, _ = draw(20_000, seed)
    wrong, probabilities = draw(20_000, seed + 100, wrong=0.02)
    assert exact_p_value(wrong, probabilities) < SIGNIFICANCE
    assert smallest_p_value(right, wrong) < SIGNIFICANCE


def test_two_sides_of_one_distribution_do_not_differ() -> None:
    left, _ = draw(5000, 1)
    right, _ = draw(5000, 2)
    assert smallest_p_value(left, right) > SIGNIFICANCE


def test_a_token_that_cannot_be_sampled_is_an_error_at_once() -> None:
    sequences, probabilities = draw(300, 3)
    probabilities[..., 5] = 0.0
    assert exact_p_value(sequences, probabilities) == 0.0


def test_one_token_that_could_not_be_drawn_where_it_was_is_an_error_too() -> None:
    # Elsewhere it could have been, so its expected number over all tokens is far above 0.
    sequences, probabilities = draw(300, 3)
    probabilities[40, 2, sequences[40][2]] = 0.0
    assert exact_p_value(sequences, probabilities) == 0.0


def test_planted_errors_come_at_the_given_rate() -> None:
    sequences = [[0] * 50 for _ in range(400)]
    changed = with_planted_error(sequences, token=9, rate=0.02, seed=0)
    share = sum(token == 9 for tokens in changed for token in tokens) / 20_000
    assert share == pytest.approx(0.02, abs=0.004)
