"""The simulation behind ``make bench-routing``: times that can be worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.harness.routing_simulation import (
    FewestSamples,
    FewestTokens,
    RoundRobin,
    RoutingPolicy,
    SimulatedEngine,
    SimulatedGroup,
    simulate,
)
from benchmarks.routing import SCENARIOS, draw_groups

ENGINE = SimulatedEngine(step_s=1.0, step_s_per_sequence=0.5, max_num_seqs=2)
POLICIES = [FewestSamples(), FewestTokens(), RoundRobin(blind=True), RoundRobin(blind=False)]


def group(*lengths: int, at_s: float = 0.0, max_tokens: int = 100) -> SimulatedGroup:
    return SimulatedGroup(arrives_at_s=at_s, lengths=lengths, max_tokens=max_tokens)


def test_steps_take_longer_while_two_sequences_run() -> None:
    # Two steps of 1.5 s together, then three of 1 s alone.
    assert simulate([group(2, 5)], [ENGINE], FewestSamples()) == pytest.approx([6.0])


def test_sequences_beyond_the_places_of_an_engine_wait_for_one() -> None:
    # The third begins after 3 s and has company for two of its four steps.
    done = simulate([group(2, 4), group(4)], [ENGINE], FewestSamples())
    assert done == pytest.approx([6.0, 8.0])


def test_an_engine_that_joins_late_gets_what_still_waits_in_the_router() -> None:
    late = SimulatedEngine(step_s=1.0, step_s_per_sequence=0.5, max_num_seqs=2, joins_at_s=1.0)
    groups = [group(2, 2), group(2, 2), group(2, 2)]
    alone = simulate(groups, [ENGINE], FewestSamples())
    helped = simulate(groups, [ENGINE, late], FewestSamples())
    assert alone == pytest.approx([3.0, 6.0, 9.0])
    assert helped == pytest.approx([3.0, 6.0, 4.0])


def test_round_robin_gives_the_next_in_turn_whatever_it_holds() -> None:
    # The first engine has the long ones, for lack of looking; the other is done early.
    groups = [group(20), group(1), group(20, at_s=2.0), group(1, at_s=2.0)]
    blind = simulate(groups, [ENGINE, ENGINE], RoundRobin(blind=True))
    looking = simulate(groups, [ENGINE, ENGINE], FewestSamples())
    assert looking[2] == pytest.approx(22.0)
    assert blind[2] > looking[2] + 5


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_group_ends_after_it_has_come(policy: RoutingPolicy, scenario: object) -> None:
    assert scenario in SCENARIOS
    groups = draw_groups(scenario, seed=3)[:120]  # type: ignore[arg-type]
    done_s = simulate(groups, scenario.engines, policy)  # type: ignore[attr-defined]
    fastest_s = 0.012
    assert all(
        done >= g.arrives_at_s + max(g.lengths) * fastest_s - 1e-6
        for g, done in zip(groups, done_s, strict=True)
    )
