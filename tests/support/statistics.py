"""Tests of whether samples have the distribution they should have, over a small vocabulary.

``smallest_p_value`` compares two sides' samples with each other; ``exact_p_value`` compares one
side with probabilities known from elsewhere.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import chi2, chi2_contingency

MIN_EXPECTED_COUNT = 8


def chi_square_p_value(left: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Probability of a difference at least this large if both sides have one distribution.

    Outcomes too rare for the test's approximation are pooled.
    """
    counts = [Counter(left), Counter(right)]
    totals = counts[0] + counts[1]
    share = min(len(left), len(right)) / (len(left) + len(right))
    common = [key for key, total in totals.items() if total * share >= MIN_EXPECTED_COUNT]
    table = np.array([[side[key] for key in common] for side in counts])
    rest = np.array([[len(left)], [len(right)]]) - table.sum(axis=1, keepdims=True)
    if rest.sum() * share >= MIN_EXPECTED_COUNT:
        table = np.hstack([table, rest])
    if table.shape[1] < 2:
        return 1.0
    return float(chi2_contingency(table).pvalue)


def smallest_p_value(
    left: Sequence[Sequence[int]], right: Sequence[Sequence[int]], *, longest_tuple: int = 3
) -> float:
    """Bonferroni-corrected smallest p-value over every position's token, pair and triple.

    Each sequence contributes one outcome to each test, so the outcomes of a test are independent.

    Args:
        left, right: token sequences [num_sequences][num_tokens], all of one length.
    """
    length = len(left[0])
    p_values = []
    for width in range(1, longest_tuple + 1):
        for position in range(length - width + 1):
            window = slice(position, position + width)
            p_values.append(
                chi_square_p_value(
                    [tuple(s[window]) for s in left], [tuple(s[window]) for s in right]
                )
            )
    return min(1.0, min(p_values) * len(p_values))


def exact_p_value(sequences: Sequence[Sequence[int]], probabilities: np.ndarray) -> float:
    """Bonferroni-corrected smallest p-value of tokens against their known distributions.

    Given all tokens before it, a token is one draw from its own distribution. What is seen minus
    what is expected is therefore a martingale: its sum over all tokens, dependent as they are, is
    normal with the summed covariance. Summed by token, and by the rank of the token.

    Args:
        sequences: [num_sequences][num_tokens].
        probabilities: [num_sequences, num_tokens, vocab_size], each given the tokens before.
    """
    vocab_size = probabilities.shape[-1]
    flat_NV = probabilities.reshape(-1, vocab_size).astype(np.float64)
    tokens_N = np.asarray(sequences).reshape(-1)
    if (flat_NV[np.arange(len(tokens_N)), tokens_N] == 0).any():
        return 0.0  # one token that cannot be drawn is proof enough
    order_NV = np.argsort(-flat_NV, axis=1, kind="stable")
    rank_N = (order_NV == tokens_N[:, None]).argmax(axis=1)
    p_values = [
        _martingale_p_value(tokens_N, flat_NV),
        _martingale_p_value(rank_N, np.take_along_axis(flat_NV, order_NV, axis=1)),
    ]
    return min(1.0, min(p_values) * len(p_values))


def _martingale_p_value(outcomes_N: np.ndarray, probabilities_NV: np.ndarray) -> float:
    expected_V = probabilities_NV.sum(axis=0)
    seen_V = np.bincount(outcomes_N, minlength=len(expected_V)).astype(np.float64)
    common = expected_V >= MIN_EXPECTED_COUNT
    # One dimension too many (everything adds up to one) is left to the rank of the covariance.
    p_NC = probabilities_NV[:, common]
    difference_C = (seen_V - expected_V)[common]
    covariance_CC = np.diag(p_NC.sum(axis=0)) - p_NC.T @ p_NC
    values_C, vectors_CC = np.linalg.eigh(covariance_CC)
    kept = values_C > 1e-6 * values_C.max()
    projected = vectors_CC.T @ difference_C
    statistic = float((projected[kept] ** 2 / values_C[kept]).sum())
    return float(chi2.sf(statistic, df=int(kept.sum())))


def with_planted_error(
    sequences: Sequence[Sequence[int]], *, token: int, rate: float, seed: int
) -> list[list[int]]:
    """Each token becomes ``token`` with probability ``rate``: a total variation of at most that."""
    generator = random.Random(seed)
    return [[token if generator.random() < rate else t for t in s] for s in sequences]
