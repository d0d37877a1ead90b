"""Handing a sample over changes no distribution; three ways that look alike do. Summed up exactly.

The policy has three tokens, the last of which ends a sample, and what comes next depends on all
tokens before it. A sample's distribution is a fraction for each of its completions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import pytest

from rollout_server.router.group_work import GroupWork
from shared.types import FinishReason
from tests.unit.test_group_work import request, result, sample

Tokens = tuple[int, ...]
Law = dict[Tokens, Fraction]
StopRule = Callable[[Tokens], bool]
"""Whether the sample is stopped once it has these tokens."""

END = 2
MAX_TOKENS = 4


def next_token(tokens: Tokens) -> dict[int, Fraction]:
    """The policy: completions that have many ones are likely to end."""
    end = Fraction(1 + len(tokens) + sum(tokens), 8)
    return {0: (1 - end) * Fraction(2, 3), 1: (1 - end) * Fraction(1, 3), END: end}


def has_ended(tokens: Tokens) -> bool:
    return len(tokens) == MAX_TOKENS or tokens[-1:] == (END,)


def law(prefix: Tokens = ()) -> Law:
    """Of whole completions that begin like this."""
    if has_ended(prefix):
        return {prefix: Fraction(1)}
    found: Law = {}
    for token, probability in next_token(prefix).items():
        found |= {t: probability * p for t, p in law((*prefix, token)).items()}
    return found


def stop_at(tokens: Tokens, rule: StopRule) -> int | None:
    """How many tokens a sample that would become these has when it is stopped."""
    return next((k for k in range(len(tokens)) if rule(tokens[:k])), None)


RULES: dict[str, StopRule] = {
    "never": lambda tokens: False,
    "before its first token": lambda tokens: True,
    "after one token": lambda tokens: len(tokens) >= 1,
    "after two tokens": lambda tokens: len(tokens) >= 2,
    "with its first 1": lambda tokens: 1 in tokens,
    "once its tokens were slow": lambda tokens: len(tokens) + 2 * sum(tokens) >= 3,
}


def handed_over(rule: StopRule) -> Iterator[tuple[Tokens, Fraction]]:
    """What the real book of a group delivers, over all that may happen on both engines."""
    for own, probability in law().items():
        num_tokens = stop_at(own, rule)
        for rest, q in law(own[:num_tokens] if num_tokens is not None else own).items():
            work = GroupWork(request(), lambda prompt, token_ids: "", may_continue=True)
            (piece,) = work.pieces()
            if num_tokens is None:
                work.take(piece, result(sample(0, list(own))))
            else:
                work.begin_handover()
                stopped = sample(0, list(own[:num_tokens]))
                work.take(piece, result(replace(stopped, finish_reason=FinishReason.ABORT)))
                work.engine_left()
                (later,) = work.pieces()
                assert later.request.prompt_token_ids == [1, 2, *own[:num_tokens]]
                work.take(later, result(sample(0, list(rest[num_tokens:]))))
            (delivered,) = work.samples()
            yield tuple(delivered.token_ids), probability * q


def raced(rule: StopRule) -> Iterator[tuple[Tokens, Fraction]]:
    """Both go on from the same tokens, and the one that finishes first is delivered."""
    for own, probability in law().items():
        num_tokens = stop_at(own, rule)
        if num_tokens is None:
            yield own, probability
            continue
        for other, q in law(own[:num_tokens]).items():
            yield min(own, other, key=len), probability * q


def redrawn(rule: StopRule) -> Iterator[tuple[Tokens, Fraction]]:
    """The other goes on from the last look, one token older than the stop."""
    for own, probability in law().items():
        num_tokens = stop_at(own, rule)
        if not num_tokens:
            yield own, probability
            continue
        for other, q in law(own[: num_tokens - 1]).items():
            yield other, probability * q


def started_over(rule: StopRule) -> Iterator[tuple[Tokens, Fraction]]:
    """The other begins anew."""
    for own, probability in law().items():
        if stop_at(own, rule) is None:
            yield own, probability
            continue
        for other, q in law().items():
            yield other, probability * q


def summed(outcomes: Iterator[tuple[Tokens, Fraction]]) -> Law:
    total: defaultdict[Tokens, Fraction] = defaultdict(Fraction)
    for tokens, probability in outcomes:
        total[tokens] += probability
    return dict(total)


def mean_length(distribution: Law) -> Fraction:
    return sum((len(tokens) * p for tokens, p in distribution.items()), Fraction())


def test_the_sums_are_over_everything() -> None:
    assert sum(law().values()) == 1
    assert len(law()) == 1 + 2 + 4 + 8 * 3


@pytest.mark.parametrize("name", RULES)
def test_completions_that_were_handed_over_have_the_policys_distribution(name: str) -> None:
    assert summed(handed_over(RULES[name])) == law()


@pytest.mark.parametrize("delivered", [raced, redrawn, started_over])
def test_what_looks_alike_makes_completions_shorter(
    delivered: Callable[[StopRule], Iterator[tuple[Tokens, Fraction]]],
) -> None:
    distribution = summed(delivered(RULES["after two tokens"]))
    assert sum(distribution.values()) == 1
    assert mean_length(distribution) < mean_length(law())
