"""``python -m trainer.demo_model --output DIR``: make a small model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shared.config.trainer import ArithmeticTaskConfig
from shared.errors import ConfigurationError, SlipstreamError
from shared.progress import ProgressBar, is_watched
from trainer.demo_model.presets import Preset

if TYPE_CHECKING:
    from trainer.demo_model.warm_start import WarmStartProgress

_REPORT_EVERY_STEPS = 20
"""Where nobody watches a bar."""
_MAX_NUM_THREADS = 2


def main(arguments: list[str] | None = None) -> int:
    """Entry point. 0: made or already there; 1: failed; 2: wrong arguments; 130: interrupted."""
    options = _parse(arguments)
    try:
        return _make(options)
    except ConfigurationError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 2
    except SlipstreamError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    defaults = ArithmeticTaskConfig()
    parser = argparse.ArgumentParser(
        prog="python -m trainer.demo_model",
        description="Create a small Qwen3 model with its own tokenizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", "-o", type=Path, required=True, help="directory to create")
    parser.add_argument(
        "--preset",
        default=Preset.TINY_ARITHMETIC.value,
        choices=[preset.value for preset in Preset],
        help="which model",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument(
        "--warm-start-steps",
        type=int,
        default=400,
        help="most supervised steps; ends earlier at the accuracy wanted",
    )
    parser.add_argument(
        "--num-terms",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        default=defaults.num_terms,
        help="terms per sum (trainer.task.num_terms)",
    )
    parser.add_argument(
        "--max-operand",
        type=int,
        default=defaults.max_operand,
        help="largest operand (trainer.task.max_operand)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    if options.warm_start_steps < 0:
        parser.error(f"--warm-start-steps {options.warm_start_steps} is below 0")
    return options


def _make(options: argparse.Namespace) -> int:
    # After the arguments are known to be right: torch and transformers take seconds to import.
    import torch
    from transformers.utils import logging as transformers_logging

    from trainer.demo_model.build import make_model

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(min(_MAX_NUM_THREADS, torch.get_num_threads()))
    existed = options.output.exists()
    task = ArithmeticTaskConfig(num_terms=tuple(options.num_terms), max_operand=options.max_operand)
    with ProgressBar("warm start", options.warm_start_steps) as bar:
        report = make_model(
            options.output,
            options.preset,
            options.seed,
            options.warm_start_steps,
            task,
            lambda progress: _show_progress(progress, bar),
        )
    if options.json:
        print(report.model_dump_json(indent=2))
        return 0
    accuracy = ""
    if report.accuracy is not None:
        accuracy = (
            f", held-out accuracy {report.accuracy.sampled:.0%} sampled, "
            f"{report.accuracy.greedy:.0%} greedy"
        )
    print(
        f"{options.output}: {'already there' if existed else 'made'}, {report.preset}, "
        f"{report.num_parameters / 1e6:.1f} M parameters{accuracy}"
    )
    return 0


def _show_progress(progress: WarmStartProgress, bar: ProgressBar) -> None:
    bar.show(progress.step, f"loss {progress.loss:.3f}")
    if is_watched():
        return
    if progress.accuracy is None and progress.step % _REPORT_EVERY_STEPS:
        return
    accuracy = ""
    if progress.accuracy is not None:
        accuracy = (
            f", accuracy {progress.accuracy.sampled:.0%} sampled, "
            f"{progress.accuracy.greedy:.0%} greedy"
        )
    print(
        f"warm start {progress.step}/{progress.num_steps}: loss {progress.loss:.3f}{accuracy}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
