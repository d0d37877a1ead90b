"""The rollout server as users run it, over engines without a model: a process of its own.

Everything but the engines and the tokenizer is real: uvicorn, routes, limits, router, scoring
workers, weight coordinator. ``ModelledServer`` starts it, ``python -m`` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from benchmarks.harness.cpu_parts import CpuParts
from benchmarks.harness.modelled_engine import (
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    EngineTimes,
    ModelledEngine,
)
from rollout_server.engine.protocol import ModelInfo
from rollout_server.http_server import http_server, serve_quietly
from rollout_server.listener import bound_socket
from rollout_server.scoring.pool import ScoringPool
from rollout_server.service import RolloutService
from rollout_server.weights.commit_ledger import CommitLedger
from rollout_server.weights.observed_coordinator import ObservedCoordinator
from shared.api_keys import ApiKeys, parse_api_keys
from shared.clock import SystemClock
from shared.config.loading import validate_run_config
from shared.config.pools import DEFAULT_POOL
from shared.errors import InvalidRequestError, UnknownResourceError
from shared.logging import configure_logging
from shared.pool_types import RestartState
from shared.schemas.engines import EnginePoolStatus
from shared.schemas.rollouts import ChatMessage

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05
MAX_ENGINES = 4
KEYS_VARIABLE = "MODELLED_SERVER_KEYS"


class ByteTokenizer:
    """UTF-8 bytes are tokens: what tokenizing costs is the model's business."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode(errors="replace")

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self.encode("".join(f"{message.role}:{message.content};" for message in messages))


class ModelledPool:
    """Implements ``EnginePool``."""

    max_num_speculative_tokens = 8

    def __init__(self, count: int, times: EngineTimes) -> None:
        self._times = times
        self._members: list[ModelledEngine] = []
        self._num_created = 0
        self.model = ModelInfo(
            model_id="modelled", vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN
        )
        self.target_count = 0
        self._set(count)

    def engines(self) -> Sequence[ModelledEngine]:
        return tuple(self._members)

    def pools(self) -> Sequence[EnginePoolStatus]:
        return [
            EnginePoolStatus(
                name=DEFAULT_POOL,
                target_count=self.target_count,
                max_count=MAX_ENGINES,
                num_engines=len(self._members),
                num_serving=len(self._members),
                restart_state=RestartState.READY,
                restart_in_s=0.0,
                num_losses=0,
                num_losses_in_window=0,
                loss_budget=0,
            )
        ]

    async def scale(self, count: int, pool: str | None = None) -> None:
        if pool not in (None, DEFAULT_POOL):
            raise InvalidRequestError(f"there is no pool {pool!r}", param="pool")
        if count > MAX_ENGINES:
            raise InvalidRequestError(f"count {count} is above {MAX_ENGINES}", param="count")
        self._set(max(count, 1))

    def adjust(self, count: int, pool: str) -> None:
        self._set(count)

    def drain(self, engine_id: str, *, replace: bool) -> None:
        self.remove(engine_id, replace=replace)

    def remove(self, engine_id: str, *, replace: bool) -> None:
        engine = next((e for e in self._members if e.engine_id == engine_id), None)
        if engine is None:
            raise UnknownResourceError(f"there is no engine {engine_id!r}", param="engine_id")
        engine.condemn("it was removed by request")
        self._members.remove(engine)
        # One always stays: there would be nothing to ask.
        self._set(max(self.target_count - (not replace), 1))

    def _set(self, count: int) -> None:
        self.target_count = count
        while len(self._members) < count:
            self._members.append(ModelledEngine(f"engine-{self._num_created}", self._times))
            self._num_created += 1


async def serve(
    settings: dict[str, Any],
    times: EngineTimes,
    num_engines: int,
    ready: Path,
    keys: ApiKeys,
    cpu_parts: CpuParts | None,
) -> None:
    """Serve until SIGTERM. ``ready`` gets the port."""
    config = validate_run_config({"model": {"path": "modelled"}, **settings})
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    ledger = CommitLedger(ready.parent / "weights")
    pool = ModelledPool(num_engines, times)
    coordinator = ObservedCoordinator(pool, config.weights, SystemClock(), ledger)
    service = RolloutService(
        config, pool, ScoringPool(config.scoring), coordinator, ByteTokenizer()
    )
    if cpu_parts is not None:
        cpu_parts.watch(service)
    await service.start()
    with bound_socket("127.0.0.1", 0) as listener:
        listener.listen()
        server = http_server(service, keys)
        serving = asyncio.create_task(serve_quietly(server, listener))
        partial = ready.with_suffix(".partial")
        partial.write_text(str(listener.getsockname()[1]), encoding="utf-8")
        partial.rename(ready)
        await stop.wait()
        await service.dashboard.close()
        server.should_exit = True
        await serving
    await service.close()
    service.router.accounts.check()


class ModelledServer:
    """A server process for the length of a ``with`` block.

    Args:
        settings: of the run's configuration.
        keys: lines of an API key file; none: no key is asked for.
        measures_cpu: ask ``stop_and_get_cpu_parts`` where its time went.
    """

    def __init__(
        self,
        *,
        settings: dict[str, Any] | None = None,
        times: EngineTimes | None = None,
        num_engines: int = 2,
        keys: str | None = None,
        measures_cpu: bool = False,
    ) -> None:
        self._arguments = {
            "settings": settings or {},
            "times": asdict(times or EngineTimes()),
            "num_engines": num_engines,
            "measures_cpu": measures_cpu,
        }
        self._keys = keys

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="slipstream-modelled-")
        root = Path(self._directory.name)
        ready, self.log_path, self._parts_path = root / "port", root / "log", root / "parts.json"
        arguments = {**self._arguments, "ready": str(ready), "parts": str(self._parts_path)}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
        if self._keys is not None:
            environment[KEYS_VARIABLE] = self._keys
        with self.log_path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.harness.modelled_server", json.dumps(arguments)],
                stdout=log,
                stderr=log,
                env=environment,
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            if not self.is_alive or time.monotonic() > deadline_s:
                log_end = self.log()[-2000:]
                self.__exit__(None, None, None)
                raise RuntimeError(f"the modelled server did not start: {log_end}")
            time.sleep(POLL_S)
        self.port = int(ready.read_text(encoding="utf-8"))
        self.url = f"http://127.0.0.1:{self.port}"
        self._psutil = psutil.Process(self._process.pid)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self._directory.cleanup()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def rss_bytes(self) -> int:
        """Resident memory of the server, its reward workers left out."""
        return int(self._psutil.memory_info().rss)

    def cpu_s(self) -> float:
        """CPU seconds of the server so far, its reward workers left out."""
        times = self._psutil.cpu_times()
        return float(times.user + times.system)

    def workers_cpu_s(self) -> float:
        """CPU seconds of the reward workers so far."""
        every = [child.cpu_times() for child in self._psutil.children(recursive=True)]
        return sum(times.user + times.system for times in every)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.is_alive:
            self._process.terminate()
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def stop_and_get_cpu_parts(self) -> dict[str, float]:
        """Stop, and the CPU seconds of each part, of a server that measures them."""
        self.stop()
        parts: dict[str, float] = json.loads(self._parts_path.read_text(encoding="utf-8"))
        return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arguments", type=json.loads)
    options = parser.parse_args().arguments
    configure_logging("WARNING", "server")
    lines = os.environ.pop(KEYS_VARIABLE, None)
    keys = ApiKeys([] if lines is None else parse_api_keys(lines.splitlines(), KEYS_VARIABLE))
    cpu_parts = CpuParts() if options["measures_cpu"] else None
    asyncio.run(
        serve(
            options["settings"],
            EngineTimes(**options["times"]),
            options["num_engines"],
            Path(options["ready"]),
            keys,
            cpu_parts,
        )
    )
    if cpu_parts is not None:
        Path(options["parts"]).write_text(json.dumps(cpu_parts.seconds), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
