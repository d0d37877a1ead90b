"""What the client retries, with what, and for how long, against a local HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest

from shared.errors import RequestError, SlipstreamError, UnavailableError
from shared.schemas.rollouts import PromptItem, RolloutRequest
from tests.fakes.answering import FakeTime, answering, status, stream, weights
from trainer.rollout_client import FIRST_RETRY_DELAY_S, MAX_RETRY_DELAY_S, RolloutClient


@contextmanager
def client_of(url: str, time: FakeTime, timeout_s: float = 60.0) -> Iterator[RolloutClient]:
    with RolloutClient(url, timeout_s=timeout_s, pause=time.pause, clock=time.clock) as client:
        yield client


REQUEST = RolloutRequest(
    request_id="run/step=3", prompts=[PromptItem(prompt="1+1=")] * 3, stream=True
)


def indices(client: RolloutClient) -> list[int]:
    return [group.prompt_index for group in client.stream_groups(REQUEST)]


def test_groups_come_in_order_of_finishing() -> None:
    with answering(stream(2, 0, 1)) as (url, received), client_of(url, FakeTime()) as client:
        assert indices(client) == [2, 0, 1]
    ((route, body),) = received
    assert route == "POST /v1/rollouts"
    assert (body["request_id"], body["stream"], len(body["prompts"])) == ("run/step=3", True, 3)


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_server_is_asked_again_with_the_same_request(code: int) -> None:
    time = FakeTime()
    with (
        answering(status(code, "3"), status(code, "0"), stream(0, 1, 2)) as (url, received),
        client_of(url, time) as client,
    ):
        assert indices(client) == [0, 1, 2]
    assert received[0] == received[1] == received[2]
    # The first wait is the server's, the second our own back-off: twice the first one's.
    assert time.pauses_s == [3.0, 2 * FIRST_RETRY_DELAY_S]


def test_a_broken_stream_goes_on_without_repeating_a_group() -> None:
    with (
        answering(stream(1, end=None), stream(1, 0, end=None), stream(1, 0, 2)) as (url, received),
        client_of(url, FakeTime()) as client,
    ):
        assert indices(client) == [1, 0, 2]
    assert received[0] == received[1] == received[2]


@pytest.mark.parametrize(("code", "error"), [(400, RequestError), (409, RequestError)])
def test_a_refused_request_is_not_repeated(code: int, error: type[Exception]) -> None:
    time = FakeTime()
    with (
        answering(status(code)) as (url, _),
        client_of(url, time) as client,
        pytest.raises(error, match="some_code"),
    ):
        indices(client)
    assert time.pauses_s == []


def test_a_server_error_is_not_repeated() -> None:
    with (
        answering(status(500)) as (url, _),
        client_of(url, FakeTime()) as client,
        pytest.raises(SlipstreamError, match="500"),
    ):
        client.weights()


def test_an_error_line_ends_the_stream_with_its_message() -> None:
    with (
        answering(stream(0, end="error")) as (url, _),
        client_of(url, FakeTime()) as client,
        pytest.raises(SlipstreamError, match="burnt"),
    ):
        indices(client)


def test_an_absent_server_is_waited_for_and_then_given_up_with_the_setting_named() -> None:
    with answering() as (url, _):
        pass  # closed again: nobody listens on that port
    time = FakeTime()
    with (
        client_of(url, time, timeout_s=20.0) as client,
        pytest.raises(UnavailableError, match=r"weight status.*trainer\.api_timeout_s 20"),
    ):
        client.weights()
    assert sum(time.pauses_s) <= 20.0
    assert time.pauses_s == sorted(time.pauses_s)
    assert max(time.pauses_s) <= MAX_RETRY_DELAY_S


def test_progress_starts_the_patience_afresh() -> None:
    time = FakeTime()
    answers = []
    for indices_so_far in ([0], [0, 1], [0, 1, 2]):
        answers += [status(503, "7"), stream(*indices_so_far, end=None)]
    answers.append(stream(0, 1, 2))
    with answering(*answers) as (url, _), client_of(url, time, timeout_s=10.0) as client:
        assert indices(client) == [0, 1, 2]
    assert sum(time.pauses_s) > 20.0


def test_groups_that_come_again_are_no_progress() -> None:
    time = FakeTime()
    with (
        answering(*[stream(0, end=None)] * 5) as (url, received),
        client_of(url, time, timeout_s=5.0) as client,
    ):
        with pytest.raises(UnavailableError, match=r"no progress.*5 attempts"):
            indices(client)
        assert len(received) == 5, "or it is asked for ever what it has answered already"


@pytest.mark.parametrize("code", ["unavailable", "overloaded", "engine_dead"])
def test_an_error_that_passes_is_waited_out(code: str) -> None:
    time = FakeTime()
    answers = stream(0, end="error", error_code=code), stream(0, 1, 2)
    with answering(*answers) as (url, received), client_of(url, time) as client:
        assert indices(client) == [0, 1, 2]
    assert received[0] == received[1]
    assert len(time.pauses_s) == 1


def test_a_stop_ends_the_waiting() -> None:
    time = FakeTime()
    time.stop = True
    with (
        answering(status(503, "1")) as (url, _),
        client_of(url, time) as client,
        pytest.raises(UnavailableError),
    ):
        client.weights()
    assert len(time.pauses_s) == 1


def test_an_answer_of_another_shape_is_an_error_that_says_so() -> None:
    def garbage(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'{"version": 3}')

    with (
        answering(garbage) as (url, _),
        client_of(url, FakeTime()) as client,
        pytest.raises(SlipstreamError, match="not what this version expects"),
    ):
        client.weights()


def test_small_answers_are_parsed() -> None:
    with answering(weights(5)) as (url, received), client_of(url, FakeTime()) as client:
        assert client.weights().committed_version == 5
    assert received == [("GET /v1/weights", None)]


def test_aborting_what_is_already_gone_is_fine() -> None:
    with (
        answering(status(404), status(500)) as (url, received),
        client_of(url, FakeTime()) as client,
    ):
        client.abort("run/step=3")
        with pytest.raises(SlipstreamError, match="500"):
            client.abort("run/step=3")
    assert received[0][0] == "DELETE /v1/rollouts/run/step=3"


def test_a_request_without_an_id_cannot_be_streamed() -> None:
    with (
        client_of("http://127.0.0.1:9", FakeTime()) as client,
        pytest.raises(ValueError, match="request_id"),
    ):
        next(client.stream_groups(RolloutRequest(prompts=[PromptItem(prompt="x")])))
