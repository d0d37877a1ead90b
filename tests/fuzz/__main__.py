"""``make fuzz``: whatever comes in, no 5xx, no dead server, no memory that is not given back.

Three servers over engines without a model, each a process of its own: without API keys and with
them (schemathesis in all phases, then raw bodies and broken requests), and one whose clients leave
in the middle. Ends with one line of JSON, and keeps it in ``benchmarks/results/fuzz.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.modelled_server import ModelledServer
from benchmarks.harness.results import print_last_line, write_result
from tests.fuzz.aborts import SETTINGS as ABORT_SETTINGS
from tests.fuzz.aborts import TIMES, AbortCounts, abort_many
from tests.fuzz.raw import RawCounts, send_raw_bodies, send_raw_streams
from tests.fuzz.schema_cases import SchemaRun, run_schemathesis
from tests.fuzz.scraped import answers_by_status, scrape

KEY = "fuzz-0123456789abcdef"
KEYS = f"fuzz rollout,admin,metrics {KEY}\n"
SETTINGS: dict[str, Any] = {
    "server": {
        "result_store_mib": 8,
        "limits": {"max_n": 16, "max_tokens": 256, "max_prompts_per_request": 64},
    }
}
WARM_UP_BODIES = 500
SCHEMATHESIS_TIMEOUT_S = 3600.0
BARS = {"schema_cases": 5000, "raw_bodies": 10_000, "rss_growth_mb": 50.0, "abort_slope_mb": 1.0}


class Fuzzed:
    """What one server was put through."""

    def __init__(self, server: ModelledServer, key: str | None) -> None:
        self._server = server
        self._key = key
        self.deaths = 0
        self.schema: SchemaRun | None = None
        self.raw = RawCounts()
        self.streams = 0
        self.server_errors = 0
        self.rss_growth_mb = 0.0

    def run(self, directory: Path, max_examples: int, raw_bodies: int, seed: int) -> None:
        """Warm up, then everything; a server that dies ends it."""
        port = self._server.port
        try:
            asyncio.run(send_raw_bodies(port, WARM_UP_BODIES, seed + 1, self._key))
            before_bytes = self._server.rss_bytes()
            self.schema = run_schemathesis(
                self._server.url,
                directory,
                max_examples=max_examples,
                seed=seed,
                key=self._key,
                timeout_s=SCHEMATHESIS_TIMEOUT_S,
            )
            self.raw = asyncio.run(send_raw_bodies(port, raw_bodies, seed, self._key))
            self.streams = sum(asyncio.run(send_raw_streams(port, raw_bodies // 10, seed)).values())
            statuses = answers_by_status(asyncio.run(scrape(port, self._key)))
            # 503 is an answer: an engine is waited for. Everything else above 500 is a bug.
            self.server_errors = sum(
                count for status, count in statuses.items() if status >= 500 and status != 503
            )
            self.rss_growth_mb = (self._server.rss_bytes() - before_bytes) / 1e6
        except (OSError, EOFError) as exc:
            print(f"the server did not answer: {exc!r}", file=sys.stderr)
        if self._server.stop() != 0:
            self.deaths = 1
            print(self._server.log()[-5000:], file=sys.stderr)


def table(runs: list[Fuzzed], aborts: AbortCounts, abort_death: int) -> dict[str, Any]:
    """All of it added up."""
    schemas = [run.schema for run in runs if run.schema is not None]
    return {
        "bench": "fuzz",
        "fuzz": {
            "schema_cases": sum(schema.cases for schema in schemas),
            "raw_bodies": sum(run.raw.sent for run in runs),
            "server_errors": sum(run.server_errors for run in runs),
            "deaths": sum(run.deaths for run in runs) + abort_death,
            "rss_growth_mb": round(max(run.rss_growth_mb for run in runs), 2),
        },
        "schema_checks_failed": sum(schema.exit_code != 0 for schema in schemas),
        "broken_requests": sum(run.streams for run in runs),
        "wrong_answers": [text for run in runs for text in run.raw.wrong],
        "statuses": {
            str(status): count
            for status, count in sorted(
                sum(
                    (run.raw.statuses for run in runs), start=runs[0].raw.statuses.__class__()
                ).items()
            )
        },
        "aborts": {
            "aborted": aborts.aborted,
            "left_pending": aborts.left_pending,
            "left_reserved": aborts.left_reserved,
            "left_running": aborts.left_running,
            "kv_cache_usage": aborts.kv_cache_usage,
            "release_s": round(aborts.release_s, 2),
            "rss_mb_per_1000": round(aborts.rss_mb_per_1000, 3),
            "rss_mb": [round(value, 2) for value in aborts.rss_mb],
        },
    }


def is_clean(result: dict[str, Any]) -> bool:
    """Every bar is met."""
    fuzz, aborts = result["fuzz"], result["aborts"]
    left = ("left_pending", "left_reserved", "left_running", "kv_cache_usage")
    return (
        fuzz["schema_cases"] >= BARS["schema_cases"]
        and fuzz["raw_bodies"] >= BARS["raw_bodies"]
        and fuzz["server_errors"] == fuzz["deaths"] == result["schema_checks_failed"] == 0
        and fuzz["rss_growth_mb"] < BARS["rss_growth_mb"]
        and not result["wrong_answers"]
        and not any(aborts[name] for name in left)
        and aborts["rss_mb_per_1000"] < BARS["abort_slope_mb"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-examples", type=int, default=250, help="per operation and phase")
    parser.add_argument("--raw-bodies", type=int, default=10_000, help="half of them with a key")
    parser.add_argument("--aborts", type=int, default=1000, help="per round")
    parser.add_argument("--abort-rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="keep schemathesis's reports here")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="slipstream-fuzz-") as directory:
        for number, keys in enumerate((None, KEYS)):
            with ModelledServer(settings=SETTINGS, keys=keys) as server:
                run = Fuzzed(server, None if keys is None else KEY)
                run.run(
                    Path(directory), options.max_examples, options.raw_bodies // 2, options.seed
                )
                runs.append(run)
                if run.schema is not None and (run.schema.exit_code or options.output):
                    folder = options.output or Path(".")
                    path = folder / f"schemathesis-{number}.txt"
                    path.write_text(run.schema.output, encoding="utf-8")
                    print(f"schemathesis: exit {run.schema.exit_code}, {path}", file=sys.stderr)
        with ModelledServer(settings=ABORT_SETTINGS, times=TIMES) as server:
            aborts = asyncio.run(
                abort_many(server, options.aborts, options.abort_rounds, options.seed)
            )
            abort_death = int(server.stop() != 0)
    result = table(runs, aborts, abort_death)
    result["clean"] = is_clean(result)
    write_result(result, None)
    print_last_line(result)
    return 0 if result["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
