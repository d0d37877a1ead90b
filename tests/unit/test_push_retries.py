"""Which failed pushes are sent again, with what, how often, and what a restart changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from shared.config.weights import WeightsConfig
from shared.errors import (
    ConflictError,
    EngineError,
    OverloadedError,
    RequestError,
    SlipstreamError,
    UnavailableError,
    WeightCommitError,
    WeightTransferError,
)
from shared.schemas.weights import PublishRequest, TensorEntry, WeightManifest
from tests.fakes.version_server import Fate, Restart, VersionServer, refusal
from trainer.push_retries import PushFailure, judge_failure, send_push
from trainer.rollout_client import RolloutClient

Handler = Callable[[httpx.Request], httpx.Response]

SEGMENT = "slipstream-weights-1-v1.safetensors"


def request(version: int, base_version: int) -> PublishRequest:
    entry = TensorEntry(name="a", dtype="F32", shape=[1], num_bytes=4, digest=f"d{version}")
    manifest = WeightManifest(segment=SEGMENT, tensors=[entry])
    return PublishRequest(version=version, base_version=base_version, manifest=manifest)


def send(handler: Handler, push: PublishRequest, max_retries: int = 1) -> int:
    client = RolloutClient(
        "http://server",
        timeout_s=60,
        transport=httpx.MockTransport(handler),
        pause=lambda delay_s: None,
    )
    return send_push(client, push, max_retries=max_retries, answer_timeout_s=9.0).version


@pytest.fixture
def server(tmp_path: Path) -> VersionServer:
    (tmp_path / SEGMENT).touch()
    return VersionServer(tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnavailableError("x"), PushFailure.UNANSWERED),
        (OverloadedError("x"), PushFailure.UNANSWERED),
        (WeightCommitError("x"), PushFailure.TAKEN_BACK),
        (WeightTransferError("x"), PushFailure.TAKEN_BACK),
        (ConflictError("x"), PushFailure.REFUSED),
        (RequestError("x"), PushFailure.REFUSED),
        (EngineError("x"), PushFailure.REFUSED),
        (SlipstreamError("x"), PushFailure.REFUSED),
    ],
)
def test_an_error_tells_what_became_of_the_push(
    error: SlipstreamError, expected: PushFailure
) -> None:
    assert judge_failure(error) is expected


@pytest.mark.parametrize("fate", [Fate.LOST, Fate.UNANSWERED])
@pytest.mark.parametrize("restart", [None, Restart.REMEMBERS])
def test_a_push_without_an_answer_is_sent_again_as_it_was_and_committed_once(
    server: VersionServer, fate: Fate, restart: Restart | None
) -> None:
    if restart is not None:
        server.between = lambda: server.restart(restart)
    server.fates = [fate, fate]
    assert send(server.answer, request(1, 0)) == 1
    assert len(server.posts) == 3
    assert len(set(server.posts)) == 1
    assert server.commits == [(1, 0)]


@pytest.mark.parametrize("fate", [Fate.LOST, Fate.UNANSWERED])
@pytest.mark.parametrize("restart", [Restart.FORGETS, Restart.LOSES_WEIGHTS])
def test_a_server_that_forgot_the_base_version_refuses_what_is_sent_again(
    server: VersionServer, fate: Fate, restart: Restart
) -> None:
    send(server.answer, request(1, 0))
    server.between = lambda: server.restart(restart)
    server.fates = [fate]
    with pytest.raises(ConflictError, match="base_version 1 is not the committed version 0"):
        send(server.answer, request(2, 1))
    assert len(server.posts) == 3


@pytest.mark.parametrize(
    "first",
    [
        lambda: refusal(503, "unavailable", "waited 120 s for another weight push"),
        lambda: refusal(429, "overloaded"),
        lambda: (_ for _ in ()).throw(httpx.ReadTimeout("timed out")),
    ],
)
def test_a_busy_server_and_a_late_answer_are_asked_again(
    server: VersionServer, first: Callable[[], httpx.Response]
) -> None:
    firsts = [first]
    posts: list[bytes] = []

    def answer(http_request: httpx.Request) -> httpx.Response:
        posts.append(http_request.content)
        if firsts:
            result = firsts.pop()()
            return result if isinstance(result, httpx.Response) else next(result)
        return server.answer(http_request)

    assert send(answer, request(1, 0), max_retries=0) == 1
    assert posts[0] == posts[1]


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (409, "conflict", ConflictError),
        (422, "weight_verification_failed", RequestError),
        (400, "invalid_request", RequestError),
        (500, "internal_error", SlipstreamError),
    ],
)
def test_a_refused_push_is_sent_once(status: int, code: str, error: type[SlipstreamError]) -> None:
    posts: list[bytes] = []

    def answer(http_request: httpx.Request) -> httpx.Response:
        posts.append(http_request.content)
        return refusal(status, code)

    with pytest.raises(error, match=code):
        send(answer, request(1, 0), max_retries=5)
    assert len(posts) == 1


@pytest.mark.parametrize("code", ["weight_commit_failed", "weight_transfer_error"])
@pytest.mark.parametrize("num_failures", [1, 2, 3])
def test_a_push_that_was_taken_back_is_sent_again_as_often_as_configured(
    server: VersionServer, code: str, num_failures: int
) -> None:
    posts: list[bytes] = []

    def answer(http_request: httpx.Request) -> httpx.Response:
        posts.append(http_request.content)
        if len(posts) <= num_failures:
            return refusal(500, code, "e0 failed")
        return server.answer(http_request)

    if num_failures <= 2:
        assert send(answer, request(1, 0), max_retries=2) == 1
        assert len(posts) == num_failures + 1
    else:
        with pytest.raises(WeightTransferError, match=r"taken back 3 times .*push_retries 2.*e0"):
            send(answer, request(1, 0), max_retries=2)
        assert len(posts) == 3
    assert len(set(posts)) == 1


def test_the_wait_for_one_answer_is_what_the_longest_push_takes(server: VersionServer) -> None:
    timeouts: list[dict[str, float]] = []

    def answer(http_request: httpx.Request) -> httpx.Response:
        timeouts.append(http_request.extensions["timeout"])
        return server.answer(http_request)

    send(answer, request(1, 0))
    assert timeouts == [{"connect": 5.0, "read": 9.0, "write": 60, "pool": 10.0}]
    config = WeightsConfig(lock_timeout_s=7)
    assert config.longest_answer_s == config.longest_push_s + 7
