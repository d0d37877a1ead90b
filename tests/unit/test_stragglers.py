"""Which groups are late, and what a group takes along to another engine. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rollout_server.engine.protocol import GeneratedSample
from rollout_server.router.group_work import GroupWork
from rollout_server.router.stragglers import (
    MAX_GROUPS,
    MIN_GROUPS,
    StragglerLimits,
    TypicalTime,
    is_late,
)
from shared.config.routing import StragglersConfig
from shared.types import FinishReason
from tests.unit.test_group_work import news, request, result, sample, span, work_on

LIMITS = StragglerLimits(max_samples=2, patience=2.0)


@pytest.mark.parametrize(
    ("num_unfinished", "running_s", "typical_s", "late"),
    [
        (2, 20.1, 10.0, True),
        (1, 20.1, 10.0, True),
        (2, 20.0, 10.0, False),
        (3, 60.0, 10.0, False),
        (2, 60.0, None, False),
    ],
)
def test_late_is_who_runs_much_longer_than_others_with_few_samples_left(
    num_unfinished: int, running_s: float, typical_s: float | None, late: bool
) -> None:
    assert is_late(num_unfinished, running_s, typical_s, LIMITS) is late


def test_what_is_typical_is_the_median_of_the_last_groups_once_there_are_some() -> None:
    times = TypicalTime()
    for seconds in range(1, MIN_GROUPS):
        times.note(seconds)
        assert times.typical_s is None
    times.note(1000)
    assert times.typical_s == 4.5
    for _ in range(MAX_GROUPS):
        times.note(3)
    assert times.typical_s == 3


def test_a_configuration_that_is_off_has_no_limits() -> None:
    assert StragglerLimits.of(StragglersConfig()) is None
    limits = StragglerLimits.of(StragglersConfig(enabled=True))
    assert limits == StragglerLimits(max_samples=2, patience=2.0)


def stopping(work: GroupWork) -> GroupWork:
    work.begin_handover()
    return work


def aborted(one: GeneratedSample) -> GeneratedSample:
    return replace(one, finish_reason=FinishReason.ABORT)


def test_stopped_samples_take_all_along_and_finished_ones_stay_finished() -> None:
    work = work_on(request(n=3))
    (piece,) = work.pieces()
    work.note(piece, [news(1, 0, [5])])  # an old look: the engine has more by now
    stopping(work)
    finished = sample(0, [9, 9])
    stopped = aborted(sample(1, [5, 6, 7], span(3, 0, 3)))
    not_begun = aborted(replace(sample(2, []), weight_versions=[]))
    work.take(piece, result(finished, stopped, not_begun))
    assert work.num_unfinished == 2
    work.engine_left()
    fresh, rest = work.pieces()
    assert (fresh.request.request_id, fresh.sample_indices) == ("g/attempt=2/fresh", (2,))
    assert rest.request.request_id == "g/attempt=2/sample=1"
    assert rest.request.prompt_token_ids == [1, 2, 5, 6, 7]
    assert rest.request.sampling.max_tokens == 97
    work.take(rest, result(sample(0, [8], span(3, 0, 1))))
    work.take(fresh, result(sample(0, [4])))
    whole = work.samples()
    assert [s.token_ids for s in whole] == [[9, 9], [5, 6, 7, 8], [4]]
    assert whole[1].logprobs == [-5.0, -6.0, -7.0, -8.0]
    assert whole[1].weight_versions == [span(3, 0, 4)]
    assert whole[1].finish_reason is FinishReason.STOP
    assert (whole[1].num_draft_tokens, whole[1].num_accepted_tokens) == (8, 6), "of both engines"


def test_an_end_that_came_before_the_stop_counts() -> None:
    work = work_on(request(n=2))
    (piece,) = work.pieces()
    stopping(work)
    work.take(piece, result(sample(0, [5]), sample(1, [6])))
    assert work.num_unfinished == 0
    assert [s.token_ids for s in work.samples()] == [[5], [6]]


def test_a_stopped_sample_that_a_late_look_shows_is_not_taken_twice() -> None:
    work = work_on(request())
    (piece,) = work.pieces()
    stopping(work)
    stopped = aborted(sample(0, [5, 6]))
    late_look = replace(news(0, 0, []), whole=stopped)
    work.note(piece, [late_look])
    work.take(piece, result(stopped))
    work.engine_left()
    (rest,) = work.pieces()
    assert rest.request.prompt_token_ids == [1, 2, 5, 6]


def test_without_a_hand_over_an_aborted_sample_is_a_result() -> None:
    work = work_on(request())
    (piece,) = work.pieces()
    work.take(piece, result(aborted(sample(0, [5]))))
    assert work.samples()[0].finish_reason is FinishReason.ABORT


def test_a_group_is_handed_over_once() -> None:
    work = work_on(request())
    assert work.may_hand_over
    stopping(work)
    assert not work.may_hand_over
    work.engine_left()
    assert not work.may_hand_over


def test_an_engine_that_dies_before_it_has_stopped_leaves_what_was_known() -> None:
    work = work_on(request())
    (piece,) = work.pieces()
    work.note(piece, [news(0, 0, [5])])
    stopping(work)
    work.engine_died()
    assert not work.may_hand_over
    (rest,) = work.pieces()
    assert rest.request.prompt_token_ids == [1, 2, 5]
    work.take(rest, result(aborted(sample(0, [6]))))
    assert work.samples()[0].token_ids == [5, 6], "an abort of the second engine is an abort"


@pytest.mark.parametrize(
    "sampling",
    [{"seed": 1}, {"stop": ["x"]}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}],
)
def test_samples_that_would_start_over_are_left_where_they_are(
    sampling: dict[str, object],
) -> None:
    assert not work_on(request(**sampling)).may_hand_over
    assert not work_on(request(), may_continue=False).may_hand_over


def test_a_stopped_group_that_nobody_wants_any_more_ends_with_all_its_tokens() -> None:
    work = work_on(request())
    (piece,) = work.pieces()
    stopping(work)
    work.take(piece, result(aborted(sample(0, [5, 6]))))
    work.end_as_aborted()
    (ended,) = work.samples()
    assert (ended.token_ids, ended.finish_reason) == ([5, 6], FinishReason.ABORT)
    assert ended.num_draft_tokens == 4
