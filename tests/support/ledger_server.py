"""``python -m tests.support.ledger_server DIRECTORY PORT LIFE``: a server to be killed.

Real HTTP and a real ledger over fake engines, whose tokens are new ones at every attempt and carry
the number of the life as their version: what is generated twice cannot look like the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import sys
from pathlib import Path

from rollout_server.engine.protocol import GeneratedSample, GenerateRequest, GenerateResult
from rollout_server.rollouts.ledger import RolloutLedger
from shared.logging import configure_logging
from tests.fakes.engine import FakeEngine
from tests.fakes.http_server import serving
from tests.fakes.pool import FakePool
from tests.fakes.service import fake_service

LEDGER_FILE = "rollouts.sqlite3"
NUM_ENGINES = 3
MAX_DELAY_S = 0.15


class RandomEngine(FakeEngine):
    """Takes its time and never says the same twice."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.delay_s = random.uniform(0, MAX_DELAY_S)
        return await super().generate(request)

    def _sample(self, request: GenerateRequest, index: int, was_aborted: bool) -> GeneratedSample:
        sample = super()._sample(request, index, was_aborted)
        token_ids = [97 + byte % 26 for byte in os.urandom(len(sample.token_ids))]
        return dataclasses.replace(sample, token_ids=token_ids, text=bytes(token_ids).decode())


async def serve(directory: Path, port: int, life: int) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    engines = [RandomEngine(f"engine-{i}", committed_version=life) for i in range(NUM_ENGINES)]
    ledger = await RolloutLedger.open(directory / LEDGER_FILE)
    service = fake_service(pool=FakePool(engines), ledger=ledger, server={"result_ttl_s": 3600.0})
    async with serving(service, port=port):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()


if __name__ == "__main__":
    configure_logging("INFO", "server")
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
