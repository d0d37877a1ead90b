"""``python -m rollout_server.calibrate --config FILE``: measure an engine, write its calibration.

Starts one engine as the configuration would, in this process, and takes some minutes. Nothing else
should run on the machine, or rather: what will always run beside the engines should run now too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from shared.config.loading import load_run_config
from shared.config.run import RunConfig
from shared.errors import ConfigurationError, SlipstreamError
from shared.logging import configure_logging
from shared.progress import ProgressBar, is_watched

EXIT_FAILED = 1
EXIT_USAGE = 2


def main() -> int:
    """Exit code: 0 when the file is written, 1 if something failed, 2 for a wrong configuration.

    Progress goes to stderr; the last line on stdout is one JSON object.
    """
    parser = argparse.ArgumentParser(prog="python -m rollout_server.calibrate", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, help="directory (default: deploy/calibration)")
    arguments = parser.parse_args()
    try:
        config = load_run_config(arguments.config, arguments.set)
        configure_logging(config.logging.level, "calibrate", log_format=config.logging.format)
        result = asyncio.run(calibrate(config, arguments.output))
    except ConfigurationError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return EXIT_USAGE
    except SlipstreamError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(result), flush=True)
    return 0


async def calibrate(config: RunConfig, output: Path | None) -> dict[str, Any]:
    """Measure, fit, write; what was written, for a program to read."""
    # Imported only now: --help and configuration errors must not wait for vLLM.
    from rollout_server.engine.actor import EngineActor
    from rollout_server.engine.arguments import EngineSpec, engine_environment
    from rollout_server.engine.calibration_run import (
        LoadPoint,
        calibration_loads,
        fit,
        measure_thoroughly,
    )
    from rollout_server.model_info import read_model_info, resolve_device
    from rollout_server.speculation.calibration import (
        DEFAULT_DIRECTORY,
        Calibration,
        write_calibration,
    )
    from shared.types import SpeculationMode

    if not config.drafter.enabled:
        raise ConfigurationError(
            "drafter.enabled false: without a drafter there is nothing to calibrate",
            param="drafter.enabled",
        )
    device = resolve_device(config.engine.device)
    read_model_info(config)
    spec = EngineSpec(
        engine_id="calibration",
        index=0,
        model=config.model,
        # Distinct prompts share nothing, and nothing must be found from the batch before.
        engine=config.engine.model_copy(update={"enable_prefix_caching": False}),
        drafter=config.drafter,
        speculation=config.speculation.model_copy(
            update={"mode": SpeculationMode.OFF, "calibration": None, "trace_directory": None}
        ),
        device=device,
    )
    os.environ.update(engine_environment(spec))
    engine = EngineActor(spec)
    started = time.perf_counter()

    def report(number: int, load: LoadPoint) -> None:
        shape = f"{load.num_reqs} sequences, prompts of {load.num_prompt_tokens} tokens"
        bar.show(number, shape)
        if is_watched():
            return
        print(
            f"{number}/{len(loads)} after {time.perf_counter() - started:.0f} s: {shape}",
            file=sys.stderr,
        )

    try:
        facts = await engine.start()
        lengths = list(range(spec.speculation.num_speculative_tokens + 1))
        loads = calibration_loads(
            spec,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
            num_kv_tokens=facts.num_kv_blocks * facts.block_size,
        )
        if not loads:
            raise ConfigurationError(
                f"the engine's {facts.num_kv_blocks * facts.block_size} KV tokens and "
                f"{facts.max_model_len} tokens of context are too few to measure one sequence: "
                "raise engine.kv_cache_memory_mib or model.max_model_len",
                param="engine.kv_cache_memory_mib",
            )
        with ProgressBar("calibrating", len(loads)) as bar:
            points = await measure_thoroughly(engine, loads, lengths, report)
            bar.show(len(loads))
        key = engine.calibration_key(facts.drafter_scheme)
    finally:
        await engine.shutdown()
    model, quality = fit(points)
    calibration = Calibration(
        key=key,
        key_hash=key.hash,
        cost_model=model,
        median_relative_error=quality.median_relative_error,
        max_relative_error=quality.max_relative_error,
        points=points,
        circumstances={
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "measuring_s": round(time.perf_counter() - started, 1),
            "load_average": os.getloadavg(),
        },
    )
    path = write_calibration(calibration, output or DEFAULT_DIRECTORY)
    c, v = model.ratios(1, points[0].num_kv_tokens, 1)
    return {
        "path": str(path),
        "key_hash": key.hash,
        "num_points": quality.num_points,
        "median_relative_error": round(quality.median_relative_error, 4),
        "max_relative_error": round(quality.max_relative_error, 4),
        "draft_to_plain_at_1": round(c, 3),
        "verify_to_plain_at_1": round(v, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
