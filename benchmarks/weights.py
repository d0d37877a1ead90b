"""What does a weight push cost, against a plain copy of the same bytes?

The wide model, real engines in this process, shared memory, the real coordinator with its record on
disk. In each repeat a plain copy of all tensors, a full push to one engine, the same with all of it
made ready before the pause (``engine.load_ahead_mib``), a full push to two, and a push of what
changed (one element in a hundred, in every tensor) to one take turns, while one sequence per engine
is running. A push is timed from the first byte that the trainer's side writes
to the coordinator's answer, and ``until_drafting`` to the end of the drafter's rebuild behind it,
which the next side waits for; ``paused`` is the longest time an engine stood still. Before a full
push every element changes: engines load what is new and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.harness.engines import ensure_model, running_engine
from benchmarks.harness.local_engines import LocalHandle, LocalPool
from benchmarks.harness.results import print_last_line, write_result
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.protocol import GenerateRequest
from rollout_server.weights.commit_ledger import CommitLedger
from rollout_server.weights.coordinator import WeightCoordinator
from shared.clock import SystemClock
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.config.weights import WeightsConfig
from shared.delta_writer import write_delta
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.weights import PublishRequest, WeightManifest
from shared.segment_writer import TensorSpec, write_segment
from shared.types import SpeculationMode
from shared.weights import segment_name

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
INTEGERS = {2: torch.int16, 4: torch.int32}
SIDES = ["copy", "one", "ahead", "two", "delta"]
LOAD_AHEAD_MIB = 2048
"""More than the model."""
DELTA_SHARE = 0.01
"""What a step of reinforcement learning changes, about."""


def engine_spec(model: Path, index: int, num_engines: int) -> EngineSpec:
    """Every engine has its share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // num_engines, 1)
    own = cores[index * share : (index + 1) * share] if num_engines > 1 else cores
    return EngineSpec(
        engine_id=f"weights-{index}",
        index=0,
        model=ModelConfig(path=str(model), dtype="bfloat16", max_model_len=1024),
        engine=EngineConfig(
            kv_cache_memory_mib=128,
            max_num_seqs=8,
            block_size=32,
            cpu_cores=[_as_list(own)],
        ),
        drafter=DrafterConfig(),
        speculation=SpeculationConfig(mode=SpeculationMode.OFF, num_speculative_tokens=4),
        device="cpu",
    )


def _as_list(cores: list[int]) -> str:
    return ",".join(str(core) for core in cores)


async def keep_busy(engine: EngineActor, name: str) -> None:
    """One sequence after the other, until cancelled."""
    number = 0
    while True:
        number += 1
        await engine.generate(
            GenerateRequest(
                request_id=f"{name}-{number}",
                prompt_token_ids=[1, 2, 3],
                n=1,
                sampling=SamplingOptions(temperature=1.0, max_tokens=900, ignore_eos=True),
            )
        )


@contextlib.contextmanager
def loading_ahead(engine: EngineActor, wanted: bool) -> Iterator[None]:
    """Give an engine memory to load a push ahead of its pause, for this push only."""
    weights = engine._weights
    before = weights._spec
    if wanted:
        changed = before.engine.model_copy(update={"load_ahead_mib": LOAD_AHEAD_MIB})
        weights._spec = replace(before, engine=changed)
    try:
        yield
    finally:
        weights._spec = before


class Bench:
    """One coordinator over engines that stay; versions go up from push to push."""

    def __init__(self, tensors: dict[str, torch.Tensor], directory: Path) -> None:
        self._tensors = tensors
        self._copy = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        self._config = WeightsConfig(keep_on_stop=False)
        self._ledger = CommitLedger(directory)
        self._version = 0
        self._generator = torch.Generator().manual_seed(0)
        self.pool = LocalPool([])
        self.coordinator = WeightCoordinator(
            self.pool,  # type: ignore[arg-type]  # only what pushes use
            self._config,
            SystemClock(),
            self._ledger,
        )
        self.num_bytes = sum(tensor.nbytes for tensor in tensors.values())

    def copy(self) -> float:
        """Seconds of a plain copy."""
        started = time.perf_counter()
        for name, tensor in self._tensors.items():
            self._copy[name].copy_(tensor)
        return time.perf_counter() - started

    def change(self, share: float) -> None:
        """Other bits in about this share of the elements of every tensor: the lowest, so that
        values stay what they are, nearly."""
        for tensor in self._tensors.values():
            bits = tensor.view(-1).view(INTEGERS[tensor.element_size()])
            if share < 1:
                count = max(int(bits.numel() * share), 1)
                where = torch.randint(bits.numel(), (count,), generator=self._generator)
                bits[where] ^= 1
            else:
                bits ^= 1

    async def push(self, *, only_changes: bool = False) -> dict[str, float]:
        """Seconds by phase, ``all`` among them; and ``bytes`` of the file."""
        self._version += 1
        path = self._config.directory / segment_name(os.getpid(), self._version)
        started = time.perf_counter()
        try:
            manifest = await asyncio.to_thread(self._write, path, only_changes)
            published = time.perf_counter()
            num_bytes = path.stat().st_size
            request = PublishRequest(
                version=self._version, base_version=self._version - 1, manifest=manifest
            )
            response = await self.coordinator.publish(request)
        finally:
            path.unlink(missing_ok=True)
        finished = time.perf_counter()
        seconds = {"publish": published - started, **response.phases_s, "all": finished - started}
        for part in ("pause_s", "load_s", "resume_s", "paused_s"):
            longest = max(getattr(timings, part) for timings in response.engines)
            seconds[part.removesuffix("_s")] = longest
        await asyncio.gather(*(handle.drafter.ended() for handle in self.pool.members))
        seconds["until_drafting"] = time.perf_counter() - started
        rebuilt = [versions.requantize_s for versions in self.coordinator.status().engines]
        seconds["requantize"] = max(took_s for took_s in rebuilt if took_s is not None)
        return {**seconds, "bytes": num_bytes}

    def _write(self, path: Path, only_changes: bool) -> WeightManifest:
        specs = [
            TensorSpec(name, DTYPES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        ]

        def produce(spec: TensorSpec) -> list[Any]:
            return [self._tensors[spec.name].view(torch.uint8).numpy()]

        if not only_changes:
            return write_segment(path, specs, produce, takes_spare=True)
        base = self.coordinator.snapshot()
        assert base is not None, "a full push came before"
        return write_delta(
            path, specs, produce, base_path=base.path, limit_bytes=self.num_bytes // 4
        )


async def measure(model: Path, repeats: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All sides in turn, after one uncounted repeat; figures, and the seconds of every repeat."""
    tensors = {name: t.clone() for name, t in load_file(model / "model.safetensors").items()}
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as directory:
        async with contextlib.AsyncExitStack() as stack:
            bench = Bench(tensors, Path(directory))
            stack.push_async_callback(bench.coordinator.close)
            handles, engines = [], []
            for index in range(2):
                spec = engine_spec(model, index, 2)
                actor = await stack.enter_async_context(running_engine(spec))
                engines.append(actor)
                handles.append(LocalHandle(spec.engine_id, actor, WeightsConfig()))
                busy = asyncio.create_task(keep_busy(actor, spec.engine_id))
                stack.callback(busy.cancel)
            for repeat in range(repeats + 1):
                order = SIDES[repeat % len(SIDES) :] + SIDES[: repeat % len(SIDES)]
                found: dict[str, Any] = {}
                for side in order:
                    if side == "copy":
                        found[side] = await asyncio.to_thread(bench.copy)
                        continue
                    bench.pool.members = handles if side == "two" else handles[:1]
                    # An engine that was left out is behind: it loads what differs for it.
                    if side == "delta" and repeat == 0 and bench.coordinator.snapshot() is None:
                        await bench.push()
                    bench.change(DELTA_SHARE if side == "delta" else 1.0)
                    with loading_ahead(engines[0], side == "ahead"):
                        found[side] = await bench.push(only_changes=side == "delta")
                if repeat > 0:
                    rounds.append(found)
                shown = {s: v if s == "copy" else v["all"] for s, v in found.items()}
                print(f"repeat {repeat}/{repeats}, seconds: {shown}", file=sys.stderr)
    return summarize(rounds, bench.num_bytes), rounds


def summarize(rounds: list[dict[str, Any]], num_bytes: int) -> dict[str, Any]:
    """Ratios within a repeat, then their medians."""

    def median(of: Any) -> float:
        return round(statistics.median(of(r) for r in rounds), 3)

    phases = sorted(rounds[0]["one"].keys() - {"bytes"})
    return {
        "bench": "weights",
        "full_push_ratio": median(lambda r: r["one"]["all"] / r["copy"]),
        "full_push_spread": [
            round(bound(r["one"]["all"] / r["copy"] for r in rounds), 2) for bound in (min, max)
        ],
        "pause_ratio": median(lambda r: r["one"]["paused"] / r["copy"]),
        "ahead_push_ratio": median(lambda r: r["ahead"]["all"] / r["copy"]),
        "ahead_pause_ratio": median(lambda r: r["ahead"]["paused"] / r["copy"]),
        "verify_share": median(lambda r: r["one"]["verifying"] / r["one"]["all"]),
        "two_engines_ratio": median(lambda r: r["two"]["all"] / r["one"]["all"]),
        "delta_time_ratio": median(lambda r: r["delta"]["all"] / r["one"]["all"]),
        "delta_pause_ratio": median(lambda r: r["delta"]["paused"] / r["one"]["paused"]),
        "delta_bytes_ratio": round(
            statistics.median(r["delta"]["bytes"] / r["one"]["bytes"] for r in rounds), 4
        ),
        "copy_s": median(lambda r: r["copy"]),
        "bytes": num_bytes,
        "repeats": len(rounds),
        "phases_s": {phase: median(lambda r, p=phase: r["one"][p]) for phase in phases},
        "phases_of_ahead_s": {phase: median(lambda r, p=phase: r["ahead"][p]) for phase in phases},
        "phases_of_delta_s": {phase: median(lambda r, p=phase: r["delta"][p]) for phase in phases},
        "phases_of_two_s": {phase: median(lambda r, p=phase: r["two"][p]) for phase in phases},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", type=Path, default=Path(".cache/models/wide-450m"))
    options = parser.parse_args()
    model = ensure_model(options.model, "wide-450m")
    result, rounds = asyncio.run(measure(model, options.repeats))
    write_result(result, rounds)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
