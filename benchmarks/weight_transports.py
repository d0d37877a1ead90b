"""How fast do the transports ``ray`` and ``nccl`` move a version, against plain copies?

Two Ray nodes on this host, so the network is the loopback. Five sides take turns with the same
bytes: ``raw`` puts them into the store as one object and has the other node fetch it; ``spread``
brings the server's file to a file on the other node; ``upload`` is a trainer on the other node that
writes a segment into the server's directory. ``socket`` sends them through one TCP connection to a
reader that keeps nothing; ``broadcast`` is that trainer's broadcast to files on both nodes, over
gloo (with GPUs apart, over NCCL). The verification of the copy is timed by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from benchmarks.harness.ray_nodes import TwoNodes, two_nodes
from benchmarks.harness.results import print_last_line, write_result
from rollout_server.weights.snapshot import CommittedSnapshot
from rollout_server.weights.transports.collective_transport import CollectiveNodes
from rollout_server.weights.transports.ray_transport import RayNodes, RayPort
from rollout_server.weights.transports.spread import Spread
from shared.config.weights import WeightsConfig
from shared.schemas.weights import WeightManifest
from shared.segment_writer import TensorSpec, write_segment
from shared.types import TransportKind
from shared.weights import SegmentKind, segment_name
from trainer.collective_transport import CollectiveOutbox
from trainer.outbox import Outbox
from trainer.ray_transport import RayOutbox

MIB = 1 << 20
TENSOR_BYTES = 16 * MIB
SIDES = ("raw", "spread", "upload", "socket", "broadcast")
PLAIN_OF = {"spread": "raw", "upload": "raw", "broadcast": "socket"}
"""Which plain copy a side is held against."""
READ_BYTES = 4 * MIB
TIMEOUT_S = 120.0


class TimedPort(RayPort):
    """Notes when the last bucket has been written."""

    def __init__(self, nodes: TimedNodes, node_id: str, actor: Any) -> None:
        super().__init__(nodes, node_id, actor)
        self._timed = nodes

    async def finish(self, version: int, manifest: WeightManifest) -> str:
        self._timed.sent_s = time.perf_counter()
        return await super().finish(version, manifest)


class TimedNodes(RayNodes):
    sent_s = 0.0

    async def port(self, node_id: str) -> TimedPort:
        return TimedPort(self, node_id, await self.actor(node_id))


class OtherNode:
    """A trainer on the other node, and who fetches objects there."""

    def __init__(
        self, config: WeightsConfig, receiver: str, broadcast_to: list[str], num_tensors: int
    ) -> None:
        client: Any = SimpleNamespace(weights=lambda: SimpleNamespace(receiver=receiver))
        all_nodes: Any = SimpleNamespace(
            weights=lambda: SimpleNamespace(
                receiver=broadcast_to[0], node_receivers=broadcast_to[1:]
            )
        )
        self._outboxes: dict[str, Outbox] = {
            "upload": RayOutbox(config, client),
            "broadcast": CollectiveOutbox(config, all_nodes),
        }
        self._specs, self._tensors = make_tensors(num_tensors)

    def fetch(self, data: npt.NDArray[np.uint8]) -> int:
        """Its argument lies in this node's store by now."""
        return len(data)

    def send(self, side: str, version: int) -> float:
        """Seconds until all of it lies where it is to go."""
        started = time.perf_counter()
        self._outboxes[side].write(
            version, self._specs, lambda spec: pieces(self._tensors[spec.name])
        )
        return time.perf_counter() - started

    def discard(self, side: str) -> None:
        self._outboxes[side].discard()

    def send_plain(self, address: str, port: int, num_bytes: int) -> None:
        """The tensors, and zeros up to the size of the file, through one connection."""
        with socket.create_connection((address, port), TIMEOUT_S) as connection:
            for tensor in self._tensors.values():
                connection.sendall(tensor.data)
                num_bytes -= len(tensor)
            connection.sendall(bytes(num_bytes))


def make_tensors(num_tensors: int) -> tuple[list[TensorSpec], dict[str, npt.NDArray[np.uint8]]]:
    random = np.random.default_rng(0)
    specs = [TensorSpec(f"w{i}", "U8", (TENSOR_BYTES,)) for i in range(num_tensors)]
    return specs, {spec.name: random.integers(0, 256, TENSOR_BYTES, np.uint8) for spec in specs}


def pieces(tensor: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    yield tensor


class Bench:
    """The server's side, on the first node."""

    def __init__(self, cluster: TwoNodes, config: WeightsConfig, num_tensors: int) -> None:
        self._cluster = cluster
        self._config = config
        self._num_tensors = num_tensors
        self._nodes = TimedNodes(config)
        self._collective = CollectiveNodes(config)
        self._version = 1

    async def start(self) -> None:
        second = self._cluster.second_id
        receiver = await self._nodes.start_receiver()
        broadcast_to = [await self._collective.start_receiver()]
        await self._collective.welcome(second)
        broadcast_to += [name for name in [self._collective.receiver_on(second)] if name]
        self._other = (
            ray.remote(OtherNode)
            .options(num_cpus=0, resources={"second": 1})
            .remote(self._config, receiver, broadcast_to, self._num_tensors)
        )
        specs, tensors = make_tensors(self._num_tensors)
        path = self._config.directory / segment_name(os.getpid(), 1, SegmentKind.SERVER)
        manifest = write_segment(path, specs, lambda spec: [tensors[spec.name]])
        self._snapshot = CommittedSnapshot(version=1, path=str(path), manifest=manifest)
        self._whole = np.fromfile(path, np.uint8)
        self.num_bytes = len(self._whole)

    async def measure(self, side: str) -> dict[str, float]:
        return await getattr(self, f"_{side}")()

    async def _raw(self) -> dict[str, float]:
        started = time.perf_counter()
        whole = await asyncio.to_thread(ray.put, self._whole)
        put = time.perf_counter()
        await self._other.fetch.remote(whole)
        finished = time.perf_counter()
        return {"raw": finished - started, "raw_put": put - started}

    async def _spread(self) -> dict[str, float]:
        second = self._cluster.second_id
        started = time.perf_counter()
        outcomes = await Spread(self._nodes, self._snapshot, self._config).run([second])
        finished = time.perf_counter()
        assert outcomes[second].path is not None, outcomes
        await (await self._nodes.port(second)).remove(1)
        sent = self._nodes.sent_s
        return {"spread": sent - started, "verify": finished - sent}

    async def _upload(self) -> dict[str, float]:
        return await self._pushed("upload")

    async def _broadcast(self) -> dict[str, float]:
        return await self._pushed("broadcast")

    async def _pushed(self, side: str) -> dict[str, float]:
        self._version += 1
        seconds: float = await self._other.send.remote(side, self._version)
        await self._other.discard.remote(side)
        return {side: seconds}

    async def _socket(self) -> dict[str, float]:
        address = str(ray.util.get_node_ip_address())
        with socket.create_server((address, 0)) as listener:
            listener.settimeout(TIMEOUT_S)
            port = listener.getsockname()[1]
            started = time.perf_counter()
            sent = self._other.send_plain.remote(address, port, self.num_bytes)
            num_read = await asyncio.to_thread(read_all, listener)
            seconds = time.perf_counter() - started
        await sent
        assert num_read == self.num_bytes, f"{num_read} of {self.num_bytes} bytes"
        return {"socket": seconds}

    async def close(self) -> None:
        await self._collective.close()
        await self._nodes.close()


def read_all(listener: socket.socket) -> int:
    """How many bytes the first connection brings."""
    buffer = bytearray(READ_BYTES)
    num_read = 0
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(TIMEOUT_S)
        while num := connection.recv_into(buffer):
            num_read += num
    return num_read


async def measure(
    cluster: TwoNodes, config: WeightsConfig, num_tensors: int, repeats: int
) -> dict[str, Any]:
    """All sides in turn, after one uncounted repeat."""
    bench = Bench(cluster, config, num_tensors)
    rounds: list[dict[str, float]] = []
    try:
        await bench.start()
        for repeat in range(repeats + 1):
            found: dict[str, float] = {}
            for index in range(len(SIDES)):
                found |= await bench.measure(SIDES[(repeat + index) % len(SIDES)])
            print(f"repeat {repeat}/{repeats}, seconds: {found}", file=sys.stderr)
            if repeat > 0:
                rounds.append(found)
    finally:
        await bench.close()
    return summarize(rounds, bench.num_bytes, config.bucket_mib) | {"rounds": rounds}


def summarize(rounds: list[dict[str, float]], num_bytes: int, bucket_mib: int) -> dict[str, Any]:
    """Speeds, and ratios within a repeat; medians."""
    result: dict[str, Any] = {
        "bench": "weight_transports",
        "bytes": num_bytes,
        "bucket_mib": bucket_mib,
        "repeats": len(rounds),
    }
    for side in (*SIDES, "verify"):
        result[f"{side}_bytes_per_s"] = round(
            statistics.median(num_bytes / found[side] for found in rounds)
        )
    for side, plain in PLAIN_OF.items():
        ratios = [found[plain] / found[side] for found in rounds]
        result[f"{side}_of_{plain}"] = round(statistics.median(ratios), 3)
        result[f"{side}_of_{plain}_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of a version")
    parser.add_argument("--bucket-mib", type=int, default=WeightsConfig().bucket_mib)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    store_bytes = max(3 * options.mib // 2, 3 * options.bucket_mib) * MIB
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-", dir="/dev/shm") as directory:
        config = WeightsConfig(
            transport=TransportKind.RAY,
            shared_memory_dir=directory,
            bucket_mib=options.bucket_mib,
        )
        with two_nodes(store_bytes) as cluster:
            num_tensors = options.mib * MIB // TENSOR_BYTES
            result = asyncio.run(measure(cluster, config, num_tensors, options.repeats))
    rounds = result.pop("rounds")
    write_result(result, rounds)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
