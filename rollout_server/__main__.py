"""``python -m rollout_server --config FILE``: the rollout server process."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from shared.api_keys import KEYS_VARIABLE
from shared.config.loading import load_run_config
from shared.config.server_access import check_server_access
from shared.errors import ConfigurationError, SlipstreamError
from shared.logging import configure_logging

EXIT_FAILED = 1
EXIT_USAGE = 2


def main() -> int:
    """Exit code: 0 after a clean stop, 1 if something failed, 2 for a wrong configuration."""
    parser = argparse.ArgumentParser(prog="python -m rollout_server", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        config = load_run_config(arguments.config, arguments.set)
        api_keys = check_server_access(config.server, os.environ)
        # Ray and every process it starts would inherit it.
        os.environ.pop(KEYS_VARIABLE, None)
        configure_logging(config.logging.level, "server", log_format=config.logging.format)
        # Imported only now: --help and configuration errors must not wait for Ray and vLLM.
        from rollout_server.launch import serve

        asyncio.run(serve(config, api_keys))
    except ConfigurationError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return EXIT_USAGE
    except SlipstreamError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
