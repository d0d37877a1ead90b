"""Chi-square comparison of two sides' samples over a small set of outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import chi2_contingency

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


def smallest_p_value(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """Bonferroni-corrected smallest p-value over every position's token and every adjacent pair.

    Each sequence contributes one outcome to each test, so the outcomes of a test are independent.

    Args:
        left, right: token sequences [num_sequences][num_tokens], all of one length.
    """
    length = len(left[0])
    p_values = []
    for position in range(length):
        p_values.append(
            chi_square_p_value([s[position] for s in left], [s[position] for s in right])
        )
    for position in range(length - 1):
        window = slice(position, position + 2)
        p_values.append(
            chi_square_p_value([tuple(s[window]) for s in left], [tuple(s[window]) for s in right])
        )
    return min(1.0, min(p_values) * len(p_values))
