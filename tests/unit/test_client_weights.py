"""Weights pushed by the client: from numpy and torch, byte for byte, and nothing left behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch

from shared.client import AsyncRolloutClient, RolloutClient, WeightPush
from shared.client.weight_push import write_push
from shared.errors import ConflictError, WeightTransferError
from shared.schemas.base import ErrorBody, ErrorResponse
from shared.schemas.weights import PublishRequest, PublishResponse, WeightManifest, WeightsResponse
from shared.spare_segments import SPARE_PREFIX
from shared.weights import build_manifest


class WeightServer:
    """Reads what is pushed while it is there; answers can be lost."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.committed_version = 3
        self.pushed: dict[str, torch.Tensor] = {}
        self.num_lost_answers = 0
        self.comes_first: dict[str, torch.Tensor] | None = None
        """Committed by another trainer under the version of the next push, which gets lost."""
        self._manifest: WeightManifest | None = None

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            state = WeightsResponse(
                committed_version=self.committed_version, engines=[], history=[]
            )
            return httpx.Response(200, content=state.model_dump_json())
        push = PublishRequest.model_validate_json(request.content)
        if self.comes_first is not None:
            self.pushed, self.comes_first = self.comes_first, None
            self.committed_version = push.version
            raise httpx.ConnectError("connection refused")
        known = None if self._manifest is None else self._manifest.tensors
        if push.version == self.committed_version and push.manifest.tensors == known:
            return self._accepted(push)  # as ``admit_push`` has it
        if push.base_version != self.committed_version:
            error = ErrorBody(code="conflict", type="t", message="base_version is wrong")
            return httpx.Response(409, content=ErrorResponse(error=error).model_dump_json())
        path = self.directory / push.manifest.segment
        assert build_manifest(path) == push.manifest
        self.pushed = safetensors.torch.load_file(path)
        self.committed_version, self._manifest = push.version, push.manifest
        if self.num_lost_answers:
            self.num_lost_answers -= 1
            raise httpx.ReadError("connection reset")
        return self._accepted(push)

    def _accepted(self, push: PublishRequest) -> httpx.Response:
        answer = PublishResponse(
            version=push.version, verify_s=0.0, total_s=0.1, num_bytes=0, engines=[]
        )
        return httpx.Response(200, content=answer.model_dump_json())

    def push(self, tensors: dict[str, object], **options: object) -> WeightPush:
        transport = httpx.MockTransport(self.answer)
        arguments = {"version": 4, "directory": str(self.directory), **options}
        with RolloutClient("http://127.0.0.1", transport=transport, pause=lambda _: None) as client:
            return client.publish_weights(tensors, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def server(tmp_path: Path) -> WeightServer:
    return WeightServer(tmp_path)


def test_torch_tensors_arrive_as_they_are(server: WeightServer) -> None:
    tensors = {
        "half": torch.randn(3, 4).to(torch.bfloat16),
        "turned": torch.randn(4, 3).T,
        "learned": torch.nn.Parameter(torch.randn(5)),
        "scalar": torch.tensor(2.5),
        "count": torch.tensor([1, 2]),
        "mask": torch.tensor([True, False]),
    }
    push = server.push(tensors)
    assert server.pushed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert server.pushed[name].dtype == tensor.dtype
        assert torch.equal(server.pushed[name], tensor.detach())
    assert push.num_bytes == 24 + 48 + 20 + 4 + 16 + 2
    assert list(server.directory.iterdir()) == []


def test_numpy_arrays_arrive_as_they_are(server: WeightServer) -> None:
    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "b": np.float16([1.5, 2.5]),
        "c": np.array(7, np.int64),
    }
    server.push(arrays)
    for name, array in arrays.items():
        assert np.array_equal(server.pushed[name].numpy(), array)


def test_the_memory_of_a_superseded_version_is_written_over(tmp_path: Path) -> None:
    spare = tmp_path / f"{SPARE_PREFIX}1-v3.safetensors"
    spare.touch(0o600)
    inode = spare.stat().st_ino
    tensors = {"w": np.arange(6, dtype=np.float32)}
    push = write_push(tensors, version=4, base_version=3, dtype=None, directory=str(tmp_path))
    (written,) = tmp_path.iterdir()
    assert written.stat().st_ino == inode
    assert build_manifest(written) == push.manifest


def test_floating_point_is_rounded_to_the_served_dtype_and_the_rest_is_not(
    server: WeightServer,
) -> None:
    weights = torch.randn(70, 70)
    server.push({"w": weights, "n": torch.tensor([3])}, dtype="bfloat16")
    assert torch.equal(server.pushed["w"], weights.to(torch.bfloat16))
    assert server.pushed["n"].dtype == torch.int64
    server.push({"w": weights.numpy()}, dtype="float16", version=5)
    assert torch.equal(server.pushed["w"], weights.to(torch.float16))


def test_large_tensors_go_in_pieces(server: WeightServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.client.weight_push.PIECE_BYTES", 100)
    tensors = {"t": torch.randn(7, 13), "n": np.arange(91.0)}
    server.push(tensors)
    assert torch.equal(server.pushed["t"], tensors["t"])
    assert np.array_equal(server.pushed["n"].numpy(), tensors["n"])


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"a": np.zeros(2)}, {"version": 3}, "version 3 must be above its base version 3"),
        ({"a": np.zeros(2, np.complex64)}, {}, "'a' is of complex64"),
        ({"a": np.zeros(2)}, {"dtype": "int4"}, "'int4' is not one of"),
        ({"a": np.zeros(2)}, {"dtype": "bfloat16"}, "numpy cannot round to bfloat16"),
    ],
)
def test_what_cannot_be_pushed_is_named_and_leaves_no_file(
    server: WeightServer, tensors: dict[str, object], options: dict[str, object], message: str
) -> None:
    with pytest.raises(WeightTransferError, match=message):
        server.push(tensors, **options)
    assert list(server.directory.iterdir()) == []


def test_a_push_whose_answer_was_lost_is_found_committed(server: WeightServer) -> None:
    server.num_lost_answers = 1
    assert server.push({"a": np.zeros(2)}).answer.version == 4
    assert server.committed_version == 4


async def test_another_trainers_weights_under_the_same_version_are_not_ours(
    server: WeightServer,
) -> None:
    theirs = {"a": torch.ones(2)}
    server.comes_first = theirs
    with pytest.raises(ConflictError):
        server.push({"a": torch.zeros(2)})
    assert server.pushed is theirs

    async def answer(request: httpx.Request) -> httpx.Response:
        return server.answer(request)

    async def no_pause(delay_s: float) -> None:
        pass

    server.comes_first = theirs
    transport = httpx.MockTransport(answer)
    async with AsyncRolloutClient("http://x", transport=transport, pause=no_pause) as client:
        with pytest.raises(ConflictError):
            await client.publish_weights(
                {"a": torch.zeros(2)}, version=5, directory=str(server.directory)
            )
    assert server.pushed is theirs
    assert list(server.directory.iterdir()) == []


def test_a_push_on_another_base_is_refused_and_its_file_removed(server: WeightServer) -> None:
    with pytest.raises(ConflictError):
        server.push({"a": np.zeros(2)}, base_version=2)
    assert list(server.directory.iterdir()) == []


async def test_the_asynchronous_client_pushes_too_and_cleans_up_when_it_is_cancelled(
    server: WeightServer,
) -> None:
    is_called = asyncio.Event()

    async def hang(request: httpx.Request) -> httpx.Response:
        is_called.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def answer(request: httpx.Request) -> httpx.Response:
        return server.answer(request)

    tensors = {"a": torch.ones(3)}
    directory = str(server.directory)
    async with AsyncRolloutClient("http://x", transport=httpx.MockTransport(answer)) as client:
        push = await client.publish_weights(tensors, version=4, directory=directory)
    assert push.answer.version == 4
    assert torch.equal(server.pushed["a"], tensors["a"])
    async with AsyncRolloutClient("http://x", transport=httpx.MockTransport(hang)) as client:
        task = asyncio.create_task(
            client.publish_weights(tensors, version=5, base_version=4, directory=directory)
        )
        await is_called.wait()
        assert len(list(server.directory.iterdir())) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert list(server.directory.iterdir()) == []


ALONE = """
import sys

class OnlyTheClientsOwn:
    allowed = {
        "shared", "httpx", "httpcore", "h11", "anyio", "certifi", "idna", "sniffio", "pydantic",
        "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection",
    }

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        is_known = root in self.allowed or root in sys.stdlib_module_names
        if not is_known and not root.startswith("_sysconfigdata"):
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

sys.meta_path[:] = [OnlyTheClientsOwn(list(sys.meta_path))]
import shared.client
client = shared.client.RolloutClient("http://node-7:1")
assert client.url == "http://node-7:1"
print(sorted(set(sys.modules) & {"numpy", "torch", "ray", "msgpack", "xxhash"}))
"""


def test_the_client_needs_httpx_and_pydantic_only() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
