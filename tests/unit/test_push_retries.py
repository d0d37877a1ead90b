"""Which failed pushes are sent again, with what, how often, and what a restart changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from shared.types import TransportKind
from tests.fakes.version_server import Fate, Restart, VersionServer, refusal
from trainer.outbox import Written
from trainer.publish import Publisher
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


class NodeOutbox:
    """As under ``ray``: the segment lies on the server's node, and another upload makes another."""

    def __init__(self) -> None:
        self.segments: list[str] = []
        self.lying: set[str] = set()

    def write(self, version: int, *_: object, base: str | None = None) -> Written:
        assert not self.lying, "the upload before was not taken back"
        segment = f"slipstream-weights-{len(self.segments)}-v{version}.safetensors"
        self.segments.append(segment)
        self.lying.add(segment)
        entries = request(version, 0).manifest.tensors
        return Written(WeightManifest(segment=segment, tensors=entries), 4)

    def discard(self) -> None:
        self.lying.clear()


class NoTensors:
    """A policy for an outbox that does not ask for any."""

    def served_tensors(self) -> list[Any]:
        return []


@pytest.fixture
def outbox(monkeypatch: pytest.MonkeyPatch) -> NodeOutbox:
    made = NodeOutbox()
    monkeypatch.setattr("trainer.publish.make_outbox", lambda config, client: made)
    return made


def publish(handler: Handler, transport: TransportKind, directory: Path) -> int:
    client = RolloutClient(
        "http://server", timeout_s=60, transport=httpx.MockTransport(handler), pause=lambda _: None
    )
    config = WeightsConfig(
        transport=transport, shared_memory_dir=str(directory), filesystem_dir=str(directory)
    )
    policy: Any = NoTensors()
    return Publisher(client, config).publish(policy, version=1, base_version=0).version


def without_segment(outbox: NodeOutbox, http_request: httpx.Request) -> httpx.Response | None:
    """What a server says that does not find the file."""
    push = PublishRequest.model_validate_json(http_request.content)
    if push.manifest.segment in outbox.lying:
        return None
    error = {"code": "weight_verification_failed", "type": "t", "message": "is not in /dev/shm"}
    return httpx.Response(422, json={"error": error | {"param": "manifest.segment"}})


@pytest.mark.parametrize("transport", [TransportKind.RAY, TransportKind.NCCL])
@pytest.mark.parametrize("is_committed", [False, True])
def test_a_segment_that_went_with_a_killed_server_is_written_again(
    server: VersionServer,
    outbox: NodeOutbox,
    tmp_path: Path,
    transport: TransportKind,
    is_committed: bool,
) -> None:
    num_posts = 0

    def answer(http_request: httpx.Request) -> httpx.Response:
        nonlocal num_posts
        num_posts += 1
        push = PublishRequest.model_validate_json(http_request.content)
        (tmp_path / push.manifest.segment).touch()
        if num_posts == 1:
            if is_committed:
                server.answer(http_request)
            outbox.lying.clear()
            raise httpx.ReadError("connection reset")
        # A version that is committed is answered again without a look for its file.
        return (None if is_committed else without_segment(outbox, http_request)) or server.answer(
            http_request
        )

    assert publish(answer, transport, tmp_path) == 1
    assert server.commits == [(1, 0)]
    assert len(outbox.segments) == (1 if is_committed else 2)
    assert not outbox.lying


@pytest.mark.parametrize(
    ("transport", "param", "num_written"),
    [
        (TransportKind.RAY, "manifest.segment", 2),
        (TransportKind.RAY, "manifest.tensors", 1),
        (TransportKind.SHARED_MEMORY, "manifest.segment", 1),
        (TransportKind.FILESYSTEM, "manifest.segment", 1),
    ],
)
def test_what_stays_refused_fails_the_push(
    outbox: NodeOutbox, tmp_path: Path, transport: TransportKind, param: str, num_written: int
) -> None:
    def answer(http_request: httpx.Request) -> httpx.Response:
        error = {"code": "weight_verification_failed", "type": "t", "message": "no", "param": param}
        return httpx.Response(422, json={"error": error})

    with pytest.raises(RequestError, match="no"):
        publish(answer, transport, tmp_path)
    assert len(outbox.segments) == num_written


def test_a_conflict_is_not_written_again(outbox: NodeOutbox, tmp_path: Path) -> None:
    with pytest.raises(ConflictError):
        publish(lambda _: refusal(409, "conflict"), TransportKind.RAY, tmp_path)
    assert len(outbox.segments) == 1


def test_a_receiver_keeps_a_segment_for_longer_than_an_answer_takes() -> None:
    config = WeightsConfig(transport=TransportKind.RAY)
    assert config.segment_kept_s > config.longest_answer_s + config.longest_push_s
