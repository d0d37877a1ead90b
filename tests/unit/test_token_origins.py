"""Which tokens of a sample were drafted, as the scheduler notes it and as samples tell it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.speculation.token_origins import OriginNotes, token_origins


@dataclass
class Metrics:
    """vLLM's ``RequestSpecDecodeMetrics``, as level ``summary`` makes it."""

    per_step_drafted: list[int] = field(default_factory=list)
    per_step_accepted: list[int] = field(default_factory=list)


@dataclass
class Request:
    request_id: str
    spec_decode_metrics: Metrics | None = field(default_factory=Metrics)

    def origins(self, num_tokens: int) -> str:
        metrics = self.spec_decode_metrics
        assert metrics is not None
        return token_origins(metrics.per_step_drafted, metrics.per_step_accepted, num_tokens)


def verify(notes: OriginNotes, request: Request, num_drafted: int, num_accepted: int) -> None:
    notes.verified(request.request_id, num_drafted, num_accepted)
    notes.given(request, num_accepted + 1)


def test_steps_with_and_without_drafts_take_turns() -> None:
    notes, request = OriginNotes(), Request("a")
    for _ in range(3):
        notes.given(request, 1)
    verify(notes, request, 3, 1)
    verify(notes, request, 3, 3)
    verify(notes, request, 2, 0)
    notes.given(request, 1)
    assert request.origins(12) == "ppparaaabrp?"
    assert request.spec_decode_metrics == Metrics([-3, 3, 3, 2, -1], [1, 3, 0])


def test_a_step_that_ends_the_request_may_have_brought_more_than_it_keeps() -> None:
    notes, request = OriginNotes(), Request("a")
    verify(notes, request, 4, 4)
    assert request.origins(2) == "aa"


def test_requests_of_one_step_are_not_taken_for_each_other() -> None:
    notes, one, other = OriginNotes(), Request("one"), Request("other")
    notes.verified("gone", 3, 3)
    notes.given(one, 1)
    verify(notes, other, 1, 1)
    notes.given(one, 0)  # still computing its prompt
    assert (one.origins(1), other.origins(2)) == ("p", "ab")


def test_an_engine_that_cannot_speculate_notes_nothing() -> None:
    OriginNotes().given(Request("a", spec_decode_metrics=None), 1)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8))))
def test_every_token_has_an_origin_and_accepted_ones_add_up(steps: list[tuple[int, int]]) -> None:
    notes, request = OriginNotes(), Request("a")
    num_tokens = num_accepted_in_all = 0
    for num_drafted, wanted in steps:
        num_accepted = min(num_drafted, wanted)
        if num_drafted:
            verify(notes, request, num_drafted, num_accepted)
        else:
            notes.given(request, 1)
        num_tokens += num_accepted + 1
        num_accepted_in_all += num_accepted
    origins = request.origins(num_tokens)
    assert len(origins) == num_tokens
    assert origins.count("a") == num_accepted_in_all
    assert "?" not in origins
    assert origins.count("p") == sum(num_drafted == 0 for num_drafted, _ in steps)
