"""Pushing weights: the file, the versions, and answers that get lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from rollout_server.weights.delta import apply_delta
from rollout_server.weights.snapshot import CommittedSnapshot
from shared.config.engine import ModelConfig
from shared.config.weights import WeightsConfig
from shared.errors import ConflictError, RequestError, WeightTransferError
from shared.safetensors_file import read_header
from shared.schemas.weights import PublishRequest, PublishResponse
from shared.types import DeltaMode, SegmentEncoding, TransportKind
from shared.weights import SegmentKind, build_manifest, segment_name
from tests.fakes.models import make_micro_model
from trainer.policy import Policy
from trainer.publish import Publisher
from trainer.rollout_client import RolloutClient


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    path = make_micro_model(tmp_path_factory.mktemp("models") / "micro")
    config = ModelConfig(path=str(path), dtype="bfloat16")
    return Policy.load(path, config, device=torch.device("cpu"))


def publisher(directory: Path, answer: Callable[[httpx.Request], httpx.Response]) -> Publisher:
    client = RolloutClient(
        "http://server", timeout_s=5, transport=httpx.MockTransport(answer), pause=lambda _: None
    )
    config = WeightsConfig(shared_memory_dir=str(directory), delta=DeltaMode.ON)
    return Publisher(client, config)


def accepted(request: PublishRequest) -> httpx.Response:
    response = PublishResponse(
        version=request.version, verify_s=0.0, total_s=0.1, num_bytes=1, engines=[]
    )
    return httpx.Response(200, content=response.model_dump_json())


def conflict() -> httpx.Response:
    error = {"code": "conflict", "type": "t", "message": "wrong base", "param": None}
    return httpx.Response(409, json={"error": error})


def committed(version: int) -> httpx.Response:
    return httpx.Response(200, json={"committed_version": version, "engines": [], "history": []})


def test_the_segment_holds_the_policy_in_the_served_dtype_and_is_gone_afterwards(
    tmp_path: Path, policy: Policy
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        push = PublishRequest.model_validate_json(request.content)
        assert (push.version, push.base_version) == (4, 3)
        path = tmp_path / push.manifest.segment
        assert build_manifest(path) == push.manifest
        seen.update(load_file(path))
        return accepted(push)

    report = publisher(tmp_path, answer).publish(policy, version=4, base_version=3)
    assert report.version == 4
    assert report.num_bytes > 0
    expected = {name: value.bfloat16() for name, value in policy.model.state_dict().items()}
    del expected["lm_head.weight"]  # tied to the embedding
    assert seen.keys() == expected.keys()
    for name, tensor in seen.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name])
    assert list(tmp_path.iterdir()) == []


def test_a_refused_push_removes_the_segment_too(tmp_path: Path, policy: Policy) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return conflict() if request.method == "POST" else committed(7)

    with pytest.raises(RequestError, match="wrong base"):
        publisher(tmp_path, answer).publish(policy, version=4, base_version=3)
    assert list(tmp_path.iterdir()) == []


def test_other_weights_under_the_same_version_are_not_taken_for_an_answer_that_was_lost(
    tmp_path: Path, policy: Policy
) -> None:
    posts = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal posts
        if request.method == "GET":
            return committed(4)
        posts += 1
        if posts == 1:
            raise httpx.ReadError("connection reset")
        return conflict()

    # The server answers the same tensors again, so a conflict means others.
    with pytest.raises(ConflictError, match="wrong base"):
        publisher(tmp_path, answer).publish(policy, version=4, base_version=3)
    assert posts == 2


def test_versions_only_go_up(tmp_path: Path, policy: Policy) -> None:
    with pytest.raises(WeightTransferError, match="version 3 must be above"):
        publisher(tmp_path, lambda _: conflict()).publish(policy, version=3, base_version=3)


def test_segments_of_dead_trainers_are_swept_at_the_start(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stale = tmp_path / segment_name(child.pid, 1)
    child.communicate()
    stale.touch()
    own = tmp_path / segment_name(os.getpid(), 1)
    own.touch()
    publisher(tmp_path, lambda _: conflict())
    assert list(tmp_path.iterdir()) == [own]


def test_over_a_shared_disk_the_segment_is_synced_before_it_is_announced(
    tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(
        "shared.segment_writer.os.fsync",
        lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)),
    )
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        push = PublishRequest.model_validate_json(request.content)
        seen.append((push.transport.value, list(synced)))
        return accepted(push)

    client = RolloutClient("http://server", timeout_s=5, transport=httpx.MockTransport(answer))
    config = WeightsConfig(transport=TransportKind.FILESYSTEM, filesystem_dir=str(tmp_path))
    Publisher(client, config).publish(policy, version=4, base_version=3)
    ((transport, files),) = seen
    assert transport == "filesystem"
    assert files[0].endswith(".partial")
    assert files[1:] == [str(tmp_path)]


class DeltaServer:
    """Keeps what is pushed, as a server would, and says where."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pushes: list[PublishRequest] = []
        self.refuses_deltas = False
        self.base: CommittedSnapshot | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return committed(0 if self.base is None else self.base.version)
        push = PublishRequest.model_validate_json(request.content)
        self.pushes.append(push)
        own = self.directory / segment_name(os.getpid(), push.version, SegmentKind.SERVER)
        segment = self.directory / push.manifest.segment
        if push.manifest.encoding is SegmentEncoding.FULL:
            os.link(segment, own)
        elif self.refuses_deltas:
            error = {
                "code": "weight_verification_failed",
                "type": "t",
                "message": "no",
                "param": None,
            }
            return httpx.Response(422, json={"error": error})
        else:
            assert self.base is not None
            apply_delta(self.base, segment, push.manifest, own, lambda: False, is_durable=False)
        self.base = CommittedSnapshot(version=push.version, path=str(own), manifest=push.manifest)
        response = PublishResponse(
            version=push.version,
            verify_s=0.0,
            total_s=0.1,
            num_bytes=1,
            segment=own.name,
            engines=[],
        )
        return httpx.Response(200, content=response.model_dump_json())

    @property
    def encodings(self) -> list[str]:
        return [push.manifest.encoding.value for push in self.pushes]


@pytest.fixture
def changing(policy: Policy) -> Iterator[Policy]:
    """A policy that may be changed."""
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    yield policy
    policy.model.load_state_dict(before)


def step(policy: Policy, share: float) -> None:
    """Change about this share of every tensor."""
    generator = torch.Generator().manual_seed(1)
    for _, tensor in policy.served_tensors():
        tensor[torch.rand(tensor.shape, generator=generator) < share] *= -1.5


def test_after_a_full_push_only_what_changed_is_sent(tmp_path: Path, changing: Policy) -> None:
    server = DeltaServer(tmp_path)
    pushing = publisher(tmp_path, server)
    full = pushing.publish(changing, version=1, base_version=0)
    step(changing, 0.01)
    delta = pushing.publish(changing, version=2, base_version=1)
    assert server.encodings == ["full", "delta"]
    assert delta.num_bytes == full.num_bytes == full.sent_bytes - header_bytes(tmp_path)
    assert delta.sent_bytes < 0.1 * full.sent_bytes
    assert server.base is not None
    served = load_file(server.base.path)
    for name, tensor in changing.served_tensors():
        assert torch.equal(served[name], tensor.bfloat16())


def header_bytes(directory: Path) -> int:
    (path,) = directory.glob("slipstream-server-*-v1.safetensors")
    return min(span.start for span in read_header(path).values())


def test_where_much_changed_everything_is_sent(tmp_path: Path, changing: Policy) -> None:
    server = DeltaServer(tmp_path)
    pushing = publisher(tmp_path, server)
    pushing.publish(changing, version=1, base_version=0)
    step(changing, 0.5)
    pushing.publish(changing, version=2, base_version=1)
    assert server.encodings == ["full", "full"]


def test_a_delta_that_is_refused_is_followed_by_everything(
    tmp_path: Path, changing: Policy
) -> None:
    server = DeltaServer(tmp_path)
    server.refuses_deltas = True
    pushing = publisher(tmp_path, server)
    pushing.publish(changing, version=1, base_version=0)
    pushing.publish(changing, version=2, base_version=1)
    assert server.encodings == ["full", "delta", "full"]
    assert [push.version for push in server.pushes] == [1, 2, 2]


@pytest.mark.parametrize(
    ("transport", "mode", "second"),
    [
        (TransportKind.SHARED_MEMORY, DeltaMode.AUTO, "full"),
        (TransportKind.FILESYSTEM, DeltaMode.AUTO, "delta"),
        (TransportKind.FILESYSTEM, DeltaMode.OFF, "full"),
    ],
)
def test_whether_changes_alone_are_sent_is_a_question_of_transport_and_setting(
    tmp_path: Path, changing: Policy, transport: TransportKind, mode: DeltaMode, second: str
) -> None:
    server = DeltaServer(tmp_path)
    client = RolloutClient("http://server", timeout_s=5, transport=httpx.MockTransport(server))
    config = WeightsConfig(
        transport=transport,
        shared_memory_dir=str(tmp_path),
        filesystem_dir=str(tmp_path),
        delta=mode,
    )
    pushing = Publisher(client, config)
    pushing.publish(changing, version=1, base_version=0)
    step(changing, 0.01)
    pushing.publish(changing, version=2, base_version=1)
    assert server.encodings == ["full", second]


def test_without_the_servers_file_everything_is_sent(tmp_path: Path, changing: Policy) -> None:
    server = DeltaServer(tmp_path)
    pushing = publisher(tmp_path, server)
    pushing.publish(changing, version=1, base_version=0)
    assert server.base is not None
    Path(server.base.path).unlink()
    pushing.publish(changing, version=2, base_version=1)
    assert server.encodings == ["full", "full"]


def test_another_base_than_the_last_push_is_no_base(tmp_path: Path, changing: Policy) -> None:
    server = DeltaServer(tmp_path)
    pushing = publisher(tmp_path, server)
    pushing.publish(changing, version=1, base_version=0)
    pushing.publish(changing, version=9, base_version=8)
    assert server.encodings == ["full", "full"]
