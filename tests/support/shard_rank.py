"""One rank of a sharded trainer: ``python -m tests.support.shard_rank SCENARIO RANK DIRECTORY``.

Two of them meet over a file in the directory and leave ``rank<N>.json`` there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from shared.config.weights import WeightsConfig
from shared.errors import SlipstreamError
from shared.schemas.weights import PublishRequest, PublishResponse
from trainer.gathering import ShardGroup
from trainer.policy import Policy
from trainer.publish import Publisher
from trainer.rollout_client import RolloutClient

NUM_RANKS = 2
VERSION = 5
PIECE_TIMEOUT_S = 20.0


class Tied(torch.nn.Module):
    """An embedding that is also the head, rows that two ranks cannot halve, one that fills none."""

    def __init__(self, num_rows: int = 11, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(num_rows, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, 2 * width + 1) for _ in range(3))
        self.norm = torch.nn.LayerNorm(1)
        self.head = torch.nn.Linear(width, num_rows, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor([7]))


def policy_of(model: torch.nn.Module, shards: ShardGroup | None) -> Policy:
    cpu = torch.device("cpu")
    return Policy(model, served_dtype=torch.bfloat16, device=cpu, shards=shards)


def publisher(directory: Path, keep_as: Path | None = None) -> Publisher:
    """Of a server that accepts everything and keeps what it was sent."""

    def answer(request: httpx.Request) -> httpx.Response:
        push = PublishRequest.model_validate_json(request.content)
        if keep_as is not None:
            keep_as.write_bytes((directory / push.manifest.segment).read_bytes())
            keep_as.with_suffix(".json").write_text(push.manifest.model_dump_json())
        body = PublishResponse(
            version=push.version, verify_s=0.0, total_s=0.0, num_bytes=0, engines=[]
        )
        return httpx.Response(200, content=body.model_dump_json())

    client = RolloutClient("http://server", timeout_s=5, transport=httpx.MockTransport(answer))
    return Publisher(client, WeightsConfig(shared_memory_dir=str(directory)))


def publish_with(policy: Policy, publisher: Publisher) -> Callable[[], int]:
    def publish() -> int:
        return publisher.publish(policy, version=VERSION, base_version=VERSION - 1).version

    return publish


def layouts() -> dict[str, Callable[[torch.nn.Module], None]]:
    """Ways to shard ``Tied``."""

    def by_layer(model: torch.nn.Module) -> None:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)

    def by_columns(model: torch.nn.Module) -> None:
        fully_shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))

    def replicated(model: torch.nn.Module) -> None:
        mesh = init_device_mesh("cpu", (NUM_RANKS, 1), mesh_dim_names=("replica", "shard"))
        fully_shard(model, mesh=mesh)

    return {"by_layer": by_layer, "by_columns": by_columns, "replicated": replicated}


def equality(directory: Path, rank: int) -> dict[str, Any]:
    """Publish every layout; rank 0 publishes the unsharded model too."""
    found: dict[str, Any] = {}
    segments = directory / "segments"
    segments.mkdir(exist_ok=True)
    shards = ShardGroup(piece_timeout_s=PIECE_TIMEOUT_S, outcome_timeout_s=PIECE_TIMEOUT_S)
    for name, shard in layouts().items():
        model = Tied()
        shard(model)
        policy = policy_of(model, shards)
        publish = publish_with(policy, publisher(segments, directory / f"{name}.sharded"))
        found[name] = policy.push_together(publish)
    if rank == 0:
        policy = policy_of(Tied(), None)
        publish_with(policy, publisher(segments, directory / "plain.whole"))()
    found["left_over"] = sorted(path.name for path in segments.iterdir())
    return found


def memory(directory: Path, rank: int) -> dict[str, Any]:
    """Peak resident memory of a push above what was resident before it."""
    segments = directory / "segments"
    segments.mkdir(exist_ok=True)
    shards = ShardGroup(piece_timeout_s=PIECE_TIMEOUT_S, outcome_timeout_s=PIECE_TIMEOUT_S)
    model = torch.nn.Embedding(1 << 16, 1 << 10, dtype=torch.float32)
    fully_shard(model)
    policy = policy_of(model, shards)
    publish = publish_with(policy, publisher(segments))
    before_bytes = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started_s = monotonic()
    policy.push_together(publish)
    push_s = monotonic() - started_s
    peak_bytes = resident_bytes("VmHWM")
    return {
        "served_bytes": 2 * (1 << 26),
        "extra_bytes": peak_bytes - before_bytes,
        "push_s": push_s,
    }


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def failing(directory: Path, rank: int) -> dict[str, Any]:
    """Rank 0 finds no directory to write to, then cannot go on in the middle of a tensor."""
    shards = ShardGroup(piece_timeout_s=PIECE_TIMEOUT_S, outcome_timeout_s=PIECE_TIMEOUT_S)
    model = Tied()
    fully_shard(model)
    policy = policy_of(model, shards)
    found: dict[str, Any] = {}
    absent = publisher(directory / "absent")
    found["absent"] = error_of(policy, publish_with(policy, absent))

    def half() -> int:
        tensor = dict(policy.served_tensors())["embed.weight"]
        next(policy.served_pieces(tensor, 8))
        raise SlipstreamError("the disk is full")

    found["half"] = error_of(policy, half)
    # The group is still usable after both.
    found["afterwards"] = policy.push_together(lambda: 9)
    return found


def dying(directory: Path, rank: int) -> dict[str, Any]:
    """Rank 1 is gone before rank 0 asks it for its shards."""
    shards = ShardGroup(piece_timeout_s=PIECE_TIMEOUT_S, outcome_timeout_s=PIECE_TIMEOUT_S)
    model = Tied()
    fully_shard(model)
    policy = policy_of(model, shards)
    if rank == 1:
        (directory / "gone").touch()
        os._exit(0)
    while not (directory / "gone").exists():
        pass
    return {"error": error_of(policy, publish_with(policy, publisher(directory)))}


def error_of(policy: Policy, publish: Callable[[], int]) -> str:
    try:
        policy.push_together(publish)
    except SlipstreamError as exc:
        return f"{type(exc).__name__}: {exc.message}"
    return ""


def main() -> None:
    scenario, rank, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=PIECE_TIMEOUT_S),
    )
    run = {"equality": equality, "memory": memory, "failing": failing, "dying": dying}[scenario]
    (directory / f"rank{rank}.json").write_text(json.dumps(run(directory, rank)))
    # Not dist.destroy_process_group(): with a dead peer it may wait.
    os._exit(0)


if __name__ == "__main__":
    main()
