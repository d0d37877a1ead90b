"""What does rebuilding the drafter cost after a push, against copying the same weights?

The linear weights of the wide model, LM head included, in bfloat16. Sides, alternating within one
run: a plain copy into buffers that exist already, and each scheme's way into the packed weights of
its kernels, which is exactly what a push does per layer: quantize and pack. Ratios are medians of
per-repeat ratios to the copy. Then, in real engines, the times that a commit reports.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.harness.engines import ensure_model, running_engine
from benchmarks.harness.results import print_last_line, write_result
from benchmarks.harness.speculation_sides import engine_spec
from rollout_server.drafter.plan import DrafterPlan
from rollout_server.engine.arguments import engine_environment
from shared.config.engine import DrafterConfig
from shared.types import DrafterScheme, PauseMode
from shared.weights import build_manifest

COPY = "copy"
SIDES: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4"},
    "int4_asymmetric": {"scheme": "int4", "int4_symmetric": False},
    "fp8": {"scheme": "fp8"},
}
EMBEDDING = "model.embed_tokens.weight"
"""Tied: what the drafter's own LM head is made of."""
MAX_SLOW_REPEATS = 2
"""fp8 has no fast kernel on CPU and nobody should draft with it there."""


def linear_weights(model: Path) -> list[torch.Tensor]:
    """What a drafter quantizes, in memory of its own: [N, K] each, bfloat16."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        return [
            file.get_tensor(name).to(torch.bfloat16, copy=True)
            for name in file.keys()  # noqa: SIM118 (safe_open is no mapping)
            if name.endswith("proj.weight") or name in (EMBEDDING, "lm_head.weight")
        ]


def make_packers(
    weights: Sequence[torch.Tensor], settings: dict[str, Any]
) -> list[Callable[[torch.Tensor], None]]:
    """One kernel per weight."""
    # Imported here: vLLM comes with its own OpenMP, which must be preloaded first.
    from rollout_server.drafter.kernels.base import LayerShape
    from rollout_server.drafter.kernels.factory import device_abilities, make_draft_kernel

    plan = DrafterPlan.from_config(DrafterConfig.model_validate(settings), device_abilities("cpu"))
    return [
        make_draft_kernel(
            plan,
            LayerShape(num_outputs=w.shape[0], num_inputs=w.shape[1], dtype=torch.bfloat16),
            "cpu",
        ).pack
        for w in weights
    ]


def copy_into(target: torch.Tensor, weight: torch.Tensor) -> None:
    target.copy_(weight)


def measure(weights: Sequence[torch.Tensor], repeats: int) -> dict[str, list[float]]:
    """Seconds per side and repeat, after one uncounted round."""
    packers = {name: make_packers(weights, settings) for name, settings in SIDES.items()}
    packers[COPY] = [partial(copy_into, torch.empty_like(weight)) for weight in weights]
    seconds: dict[str, list[float]] = {name: [] for name in packers}
    names = list(packers)
    for repeat in range(repeats + 1):
        # Rotated, so that no side always follows the same other one.
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            if name == "fp8" and repeat > MAX_SLOW_REPEATS:
                continue
            started = time.perf_counter()
            for pack, weight in zip(packers[name], weights, strict=True):
                pack(weight)
            elapsed_s = time.perf_counter() - started
            if repeat > 0:
                seconds[name].append(elapsed_s)
        shown = {name: round(runs[-1], 3) for name, runs in seconds.items() if runs}
        print(f"repeat {repeat}/{repeats}: {shown}", file=sys.stderr)
    return seconds


async def measure_commits(model: Path, scheme: str, pushes: int) -> list[dict[str, float]]:
    """What commits report in a running engine. Two contents take turns that differ in the lowest
    bit of every element: an engine loads nothing that it has already."""
    timings = []
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="slipstream-bench-") as directory:
        segments = [Path(directory) / f"slipstream-bench-{number}.safetensors" for number in (0, 1)]
        shutil.copy(model / "model.safetensors", segments[0])
        other = {
            name: (tensor.view(torch.int16) ^ 1).view(torch.bfloat16)
            for name, tensor in load_file(segments[0]).items()
        }
        save_file(other, segments[1])
        manifests = [build_manifest(segment) for segment in segments]
        async with running_engine(engine_spec(model, scheme=DrafterScheme(scheme))) as engine:
            for version in range(1, pushes + 2):
                number = version % 2
                await engine.stage(version, str(segments[number]), manifests[number])
                await engine.load_weights(version, PauseMode.KEEP)
                commit = await engine.resume()
                requantize_s = (await engine.rebuild_drafter()).requantize_s
                if version > 1:
                    timings.append({"load_s": commit.load_s, "requantize_s": requantize_s})
    return timings


def summarize(
    seconds: dict[str, list[float]],
    commits: dict[str, list[dict[str, float]]],
    num_bytes: int,
) -> dict[str, Any]:
    """Medians; ``bytes`` are those of the bfloat16 weights, read once by every side."""
    result: dict[str, Any] = {"bench": "requantize"}
    for name, runs in seconds.items():
        ratios = [run / copy for run, copy in zip(runs, seconds[COPY], strict=False)]
        median_s = statistics.median(runs)
        result[name] = {
            "ratio_to_copy": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "seconds": round(median_s, 4),
            "bytes": num_bytes,
            "bytes_per_s": round(num_bytes / median_s),
            "repeats": len(runs),
        }
    result["num_threads"] = torch.get_num_threads()
    result["in_engine"] = {
        scheme: {
            part: round(statistics.median(timing[part] for timing in timings), 4)
            for part in ("load_s", "requantize_s")
        }
        for scheme, timings in commits.items()
    }
    return result


def restart_in_engine_environment(model: Path) -> None:
    """Run as engines do: with their OpenMP library preloaded, and every core."""
    wanted = engine_environment(engine_spec(model, scheme=DrafterScheme.INT8))
    preload = wanted.get("LD_PRELOAD")
    if preload and os.environ.get("LD_PRELOAD") != preload:
        environment = {**os.environ, "LD_PRELOAD": preload}
        environment.pop("OMP_NUM_THREADS", None)
        command = [sys.executable, "-m", "benchmarks.requantize", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--pushes", type=int, default=3, help="Per engine; 0 starts no engine.")
    parser.add_argument("--model", type=Path, default=Path(".cache/models/wide-450m"))
    options = parser.parse_args()
    model = ensure_model(options.model, "wide-450m")
    restart_in_engine_environment(model)
    torch.set_num_threads(os.cpu_count() or 1)
    weights = linear_weights(model)
    seconds = measure(weights, options.repeats)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    weights.clear()
    commits = {}
    if options.pushes:
        for scheme in ("int8", "int4"):
            commits[scheme] = asyncio.run(measure_commits(model, scheme, options.pushes))
    result = summarize(seconds, commits, num_bytes)
    write_result(result, {"seconds": seconds, "commits": commits})
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
