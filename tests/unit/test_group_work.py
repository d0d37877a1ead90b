"""What becomes of a group whose engines die. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engine.protocol import (
    GeneratedSample,
    GenerateRequest,
    GenerateResult,
    SampleProgress,
)
from rollout_server.router.group_work import GroupWork, can_continue
from shared.schemas.rollouts import SamplingOptions, WeightVersionSpan
from shared.types import FinishReason


def span(version: int, start: int, end: int) -> WeightVersionSpan:
    return WeightVersionSpan(version=version, start=start, end=end)


def request(n: int = 1, **sampling: object) -> GenerateRequest:
    options = SamplingOptions.model_validate({"max_tokens": 100, **sampling})
    return GenerateRequest(request_id="g", prompt_token_ids=[1, 2], n=n, sampling=options)


def text_of(prompt: list[int], token_ids: list[int]) -> str:
    return f"{prompt} -> {token_ids}"


def work_on(group: GenerateRequest, may_continue: bool = True) -> GroupWork:
    return GroupWork(group, text_of, may_continue=may_continue)


def sample(index: int, token_ids: list[int], *spans: WeightVersionSpan) -> GeneratedSample:
    return GeneratedSample(
        sample_index=index,
        token_ids=token_ids,
        logprobs=[-float(token_id) for token_id in token_ids],
        text="as the engine wrote it",
        finish_reason=FinishReason.STOP,
        weight_versions=list(spans) or [span(0, 0, len(token_ids))],
        num_draft_tokens=4,
        num_accepted_tokens=3,
    )


def news(index: int, start: int, token_ids: list[int], *spans: WeightVersionSpan) -> SampleProgress:
    return SampleProgress(
        sample_index=index,
        start=start,
        token_ids=token_ids,
        logprobs=[-float(token_id) for token_id in token_ids],
        weight_versions=list(spans) or [span(0, 0, start + len(token_ids))],
    )


def result(*samples: GeneratedSample) -> GenerateResult:
    return GenerateResult(engine_id="b", samples=list(samples), generate_s=1.0)


def test_a_group_begins_as_one_request_under_its_own_name() -> None:
    work = work_on(request(n=3))
    (piece,) = work.pieces()
    assert piece.request == request(n=3)
    work.take(piece, result(*(sample(index, [7]) for index in range(3))))
    assert work.num_unfinished == 0
    assert [s.text for s in work.samples()] == ["as the engine wrote it"] * 3


def test_the_rest_of_a_sample_is_asked_for_behind_what_there_is() -> None:
    work = work_on(request(min_tokens=5))
    (first,) = work.pieces()
    work.note(first, [news(0, 0, [5, 6], span(3, 0, 2))])
    work.note(first, [news(0, 2, [7], span(3, 0, 2), span(4, 2, 3))])
    work.engine_died()
    (rest,) = work.pieces()
    assert rest.request.request_id == "g/attempt=2/sample=0"
    assert rest.request.prompt_token_ids == [1, 2, 5, 6, 7]
    assert (rest.request.sampling.max_tokens, rest.request.sampling.min_tokens) == (97, 2)
    assert work.num_kept_tokens == 3
    work.take(rest, result(sample(0, [8, 9], span(4, 0, 1), span(5, 1, 2))))
    (whole,) = work.samples()
    assert whole.token_ids == [5, 6, 7, 8, 9]
    assert whole.logprobs == [-5.0, -6.0, -7.0, -8.0, -9.0]
    assert whole.weight_versions == [span(3, 0, 2), span(4, 2, 4), span(5, 4, 5)]
    assert whole.text == "[1, 2] -> [5, 6, 7, 8, 9]"
    assert whole.finish_reason is FinishReason.STOP


def test_what_finished_is_kept_and_what_had_not_begun_begins() -> None:
    work = work_on(request(n=3))
    (first,) = work.pieces()
    finished = SampleProgress(sample_index=1, whole=sample(1, [9, 9]))
    work.note(first, [finished, news(2, 0, [4])])
    work.engine_died()
    assert work.num_unfinished == 2
    fresh, rest = work.pieces()
    assert (fresh.request.n, fresh.sample_indices) == (1, (0,))
    assert (rest.request.prompt_token_ids, rest.sample_indices) == ([1, 2, 4], (2,))
    work.take(rest, result(sample(0, [5])))
    work.take(fresh, result(sample(0, [3])))
    assert [s.token_ids for s in work.samples()] == [[3], [9, 9], [4, 5]]
    assert [s.sample_index for s in work.samples()] == [0, 1, 2]


def test_a_second_death_adds_to_what_the_first_left() -> None:
    work = work_on(request())
    (piece,) = work.pieces()
    work.note(piece, [news(0, 0, [5])])
    work.engine_died()
    (piece,) = work.pieces()
    work.note(piece, [news(0, 0, [6])])
    assert work.known(piece).num_tokens == {0: 1}
    work.engine_died()
    (piece,) = work.pieces()
    assert piece.request.prompt_token_ids == [1, 2, 5, 6]
    assert piece.request.request_id == "g/attempt=3/sample=0"
    work.engine_died()  # before it had anything
    assert work.pieces()[0].request.prompt_token_ids == [1, 2, 5, 6]


def test_origins_are_known_of_the_tokens_of_the_engine_that_finished() -> None:
    work = work_on(request(n=2))
    (piece,) = work.pieces()
    work.note(piece, [news(0, 0, [11, 12])])
    work.engine_died()
    pieces = work.pieces()
    for piece in pieces:
        own = replace(sample(0, [21, 22]), token_origins="ar")
        work.take(piece, result(own))
    assert {s.sample_index: s.token_origins for s in work.samples()} == {0: "??ar", 1: "ar"}


def test_late_and_repeated_news_change_nothing() -> None:
    work = work_on(request(n=2))
    (piece,) = work.pieces()
    work.note(piece, [news(0, 0, [5, 6])])
    work.note(piece, [news(0, 0, [5, 6]), news(0, 3, [8])])
    work.note(piece, [SampleProgress(sample_index=1, whole=sample(1, [9]))])
    work.note(piece, [news(1, 0, [9])])
    known = work.known(piece)
    assert (known.num_tokens, known.finished) == ({0: 2}, frozenset({1}))
    work.take(piece, result(sample(0, [5, 6, 7]), sample(1, [1, 1, 1])))
    assert [s.token_ids for s in work.samples()] == [[5, 6, 7], [9]]


@pytest.mark.parametrize(
    "sampling",
    [{"seed": 1}, {"stop": ["."]}, {"presence_penalty": 0.5}, {"frequency_penalty": -0.5}],
)
def test_what_the_prefix_would_change_starts_over(sampling: dict[str, object]) -> None:
    group = request(**sampling)
    assert not can_continue(group.sampling)
    work = work_on(group)
    (piece,) = work.pieces()
    work.note(piece, [news(0, 0, [5, 6])])
    work.engine_died()
    (piece,) = work.pieces()
    assert piece.request.prompt_token_ids == [1, 2]
    assert piece.request.sampling == group.sampling


def test_by_configuration_everything_unfinished_starts_over() -> None:
    work = work_on(request(n=2), may_continue=False)
    (piece,) = work.pieces()
    work.note(piece, [news(0, 0, [5]), SampleProgress(sample_index=1, whole=sample(1, [9]))])
    work.engine_died()
    (piece,) = work.pieces()
    assert (piece.request.n, piece.sample_indices) == (1, (0,))
    assert piece.request.prompt_token_ids == [1, 2]


def test_an_abort_returns_what_there_is() -> None:
    work = work_on(request(n=2))
    (piece,) = work.pieces()
    work.note(piece, [news(0, 0, [5], span(3, 0, 1))])
    work.end_as_aborted()
    begun, untouched = work.samples()
    assert (begun.token_ids, begun.weight_versions) == ([5], [span(3, 0, 1)])
    assert (untouched.token_ids, untouched.text) == ([], "")
    assert begun.finish_reason is untouched.finish_reason is FinishReason.ABORT


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    deaths=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), max_size=4),
)
def test_however_engines_die_no_token_is_lost_twice_or_out_of_place(
    lengths: list[int], deaths: list[list[int]]
) -> None:
    """Every sample is the numbers from 0; its engine goes on from the end of its prompt."""
    work = GroupWork(request(n=len(lengths)), lambda prompt, ids: "", may_continue=True)
    for death in deaths:
        for piece in work.pieces():
            for number, index in enumerate(piece.sample_indices):
                begin = len(piece.request.prompt_token_ids) - 2
                end = min(begin + death[index], lengths[index])
                tokens = list(range(begin, end))
                if end == lengths[index]:
                    done = sample(number, tokens)
                    work.note(piece, [SampleProgress(sample_index=number, whole=done)])
                elif tokens:
                    work.note(piece, [news(number, 0, tokens)])
        work.engine_died()
    for piece in work.pieces():
        begin = len(piece.request.prompt_token_ids) - 2
        work.take(
            piece,
            result(
                *(
                    sample(number, list(range(begin, lengths[index])))
                    for number, index in enumerate(piece.sample_indices)
                )
            ),
        )
    for whole, length in zip(work.samples(), lengths, strict=True):
        assert whole.token_ids == list(range(length))
        assert len(whole.logprobs) == length
        covered = [i for s in whole.weight_versions for i in range(s.start, s.end)]
        assert covered == list(range(length))
