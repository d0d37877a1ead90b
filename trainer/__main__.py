"""``python -m trainer --config resolved.yaml [--resume]``: train against a running server."""

from __future__ import annotations

import argparse
import sys

from shared.config.loading import load_run_config
from shared.config.metric_sinks import check_metric_sinks
from shared.errors import ConfigurationError, SlipstreamError
from shared.logging import configure_logging


def main(arguments: list[str] | None = None) -> int:
    """Entry point. 0: finished; 1: failed; 2: wrong configuration; 130: stopped by a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="GRPO against a running rollout server (trainer.server_url).",
    )
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run's last checkpoint"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, e.g. trainer.num_steps=5; may be repeated",
    )
    options = parser.parse_args(arguments)
    try:
        config = load_run_config(options.config, options.overrides)
        check_metric_sinks(config.trainer)
        configure_logging(config.logging.level, "trainer-driver", log_format=config.logging.format)
        # Imported late: Ray takes seconds, and a wrong configuration should not have to wait.
        from trainer.launch import run_on_ray
        from trainer.status import TrainerPhase

        outcome = run_on_ray(config, resume=options.resume)
    except ConfigurationError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 2
    except SlipstreamError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if outcome is TrainerPhase.STOPPED:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
