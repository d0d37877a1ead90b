"""Everything that only a CUDA machine can show, in one command and one JSON document.

1. Every test marked ``gpu``.
2. Speculation on a 0.6B and a 7B shape with random weights: an engine without a drafter and one
   with drafts of 0, 2, 4 and 6 tokens alternate at batch 1, 4, 16 and 64, with the acceptance of
   random weights and with a synthetic one of 0.93.
3. Requantization of those shapes.

Each part runs in a process of its own. One that fails is reported and the others still run. Works
from a plain checkout too: ``PYTHONPATH=. python -m benchmarks.gpu_check``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.gpu_bars import judge_bars
from benchmarks.harness.gpu_facts import gpu_facts
from benchmarks.harness.gpu_speculation import GpuPlan, run_shape
from benchmarks.harness.gpu_tests import run_gpu_tests
from benchmarks.harness.parts import run_part, save_json
from benchmarks.harness.plugin_entry import ensure_plugin_entry_point
from benchmarks.harness.results import RESULTS_DIRECTORY, print_last_line
from benchmarks.harness.worker_probes import SERIALIZATION_VARIABLE
from shared.types import DrafterScheme

TESTS_PART = "tests"
OUTPUT_DIRECTORY_VARIABLE = "OUT"
"""Set by machines whose files are brought back from one folder."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--require-cuda", action="store_true", help="fail without a CUDA device")
    parser.add_argument("--shapes", nargs="*", default=["7b", "0.6b"])
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--scheme", default="auto", choices=[s.value for s in DrafterScheme])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 2, 4, 6])
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=530.0, help="for all parts together")
    parser.add_argument("--output", type=Path, default=None, help="the JSON file")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--part-output", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text: str) -> None:
    """A progress line."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def run_one_part(options: argparse.Namespace) -> int:
    """The child's side."""
    output: Path = options.part_output
    if options.part == TESTS_PART:
        result = run_gpu_tests()
        save_json(output, result)
        return int(result["exit_code_of_pytest"] != 0)
    os.environ[SERIALIZATION_VARIABLE] = "1"
    plan = GpuPlan(
        shape=options.part,
        scheme=DrafterScheme(options.scheme),
        batches=tuple(options.batches),
        draft_lengths=tuple(options.draft_lengths),
        num_tokens=options.num_tokens,
        repeats=options.repeats,
    )
    latest: dict[str, Any] = {"shape": options.part}

    def save(result: dict[str, Any]) -> None:
        latest.update(result)
        save_json(output, latest)

    with tempfile.TemporaryDirectory(prefix="slipstream-shapes-") as directory:
        try:
            save(asyncio.run(run_shape(plan, Path(directory), save, say)))
        except Exception as exc:
            # Whatever it was belongs into the document, beside what was measured before.
            save({"error": f"{type(exc).__name__}: {exc}"})
            raise
    return 0


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """The parent's side: one part after the other within the budget."""
    deadline = time.monotonic() + options.budget_s
    document: dict[str, Any] = {"bench": "gpu_check", "circumstances": gpu_facts(), "parts": {}}
    output = output_path(options)
    parts = list(options.shapes)
    if not options.no_tests:
        parts.insert(1, TESTS_PART)  # what bars are judged on comes first, tests next
    with tempfile.TemporaryDirectory(prefix="slipstream-gpu-check-") as directory:
        for part in parts:
            left_s = deadline - time.monotonic()
            if left_s < 1:
                document["parts"][part] = {"status": "skipped", "error": "the budget is used up"}
            else:
                say(f"part {part}, {left_s:.0f} s left")
                part_output = Path(directory) / f"{part}.json"
                arguments = [*sys.argv[1:], "--part", part, "--part-output", str(part_output)]
                command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
                document["parts"][part] = run_part(command, part_output, left_s)
            say(f"part {part}: {document['parts'][part]['status']}")
            document["bars"] = judge_bars(document["parts"].get("7b", {}))
            save_json(output, document)
    say(f"written to {output}")
    return document


def output_path(options: argparse.Namespace) -> Path:
    """``--output``, else the folder that is brought back, else ``benchmarks/results/``."""
    if options.output is not None:
        return Path(options.output)
    folder = os.environ.get(OUTPUT_DIRECTORY_VARIABLE)
    return (Path(folder) if folder else RESULTS_DIRECTORY) / "gpu_check.json"


def main() -> int:
    options = parse_arguments()
    ensure_plugin_entry_point()
    if options.part is not None:
        return run_one_part(options)
    if not torch.cuda.is_available():
        say("no CUDA device: nothing was checked")
        print_last_line({"bench": "gpu_check", "skipped": "no CUDA device"})
        return int(options.require_cuda)
    document = run_all(options)
    print_last_line(
        {
            "bench": "gpu_check",
            "device": document["circumstances"].get("device"),
            "parts": {name: part["status"] for name, part in document["parts"].items()},
            "bars": document["bars"],
        }
    )
    everything_ran = all(part["status"] == "ok" for part in document["parts"].values())
    bars_met = all(bar["met"] for bar in document["bars"].values())
    return 0 if everything_ran and bars_met else 1


if __name__ == "__main__":
    sys.exit(main())
