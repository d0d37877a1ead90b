"""A server is killed again and again while clients want their rollouts; every id is counted.

``python -m tests.chaos.server_kills --kills 200`` for a long run; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
HANG_S = 60.0
"""Longest wait of a client for one request, over all kills."""


@dataclass
class Findings:
    """What the clients saw."""

    num_kills: int = 0
    num_stops: int = 0
    num_samples_wanted: int = 0
    num_delivered: int = 0
    num_cancelled: int = 0
    problems: list[str] = field(default_factory=list)
    groups: dict[tuple[str, int], str] = field(default_factory=dict)
    """JSON of each group by request and prompt."""

    def see(self, request_id: str, group: dict[str, Any]) -> None:
        """A group that arrives again has to be the very same."""
        key, text = (request_id, group["prompt_index"]), json.dumps(group)
        if self.groups.setdefault(key, text) != text:
            self.problems.append(f"{key} was delivered twice, and differs")

    def settle(self, wanted: dict[str, Any], request_id: str) -> None:
        """Count what a finished request has."""
        for index in range(len(wanted["prompts"])):
            text = self.groups.get((request_id, index))
            if text is None:
                self.problems.append(f"{request_id} lost group {index}")
                continue
            reasons = [sample["finish_reason"] for sample in json.loads(text)["samples"]]
            if len(reasons) != wanted["n"]:
                self.problems.append(f"{request_id} group {index} has {len(reasons)} samples")
            self.num_cancelled += reasons.count("abort")
            self.num_delivered += len(reasons) - reasons.count("abort")


class KilledServer:
    """One place and one port; many lives."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.life = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self._launch()
        assert self._process is not None
        async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient() as client:
            while True:
                assert self._process.poll() is None, self.log()[-3000:]
                try:
                    await client.get(f"{self.url}/livez")
                    return
                except httpx.TransportError:
                    await asyncio.sleep(0.05)

    def _launch(self) -> None:
        self.life += 1
        arguments = [str(self.directory), str(self.port), str(self.life)]
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ledger_server", *arguments],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def end(self, number: signal.Signals) -> None:
        """Send a signal and wait until it is gone."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    def log(self) -> str:
        return (self.directory / "server.log").read_text()


async def follow(client: httpx.AsyncClient, wanted: dict[str, Any], findings: Findings) -> None:
    """Post a request until its stream has come to its end, whatever happens to the server."""
    request_id = wanted["request_id"]
    while True:
        try:
            async with client.stream("POST", "/v1/rollouts", json=wanted) as answer:
                if answer.status_code == 503:
                    await asyncio.sleep(0.05)
                    continue
                if answer.status_code != 200:
                    findings.problems.append(f"{request_id} answered {answer.status_code}")
                    return
                async for text in answer.aiter_lines():
                    line = json.loads(text)
                    if line["type"] == "group":
                        findings.see(request_id, line["group"])
                    elif line["type"] == "done":
                        return
                    elif line["error"]["code"] != "unavailable":
                        findings.problems.append(f"{request_id}: {line['error']}")
                        return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.05)


async def delete(client: httpx.AsyncClient, request_id: str, after_s: float) -> None:
    """End a request, as soon as a server is there to hear it."""
    await asyncio.sleep(after_s)
    while True:
        try:
            if (await client.delete(f"/v1/rollouts/{request_id}")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.05)


async def one_client(
    server: KilledServer, number: int, stop: asyncio.Event, findings: Findings, seed: int
) -> list[dict[str, Any]]:
    """Requests one after the other; some are ended early. All that were wanted."""
    dice = random.Random(f"{seed}-{number}")
    asked = []
    async with httpx.AsyncClient(base_url=server.url, timeout=HANG_S) as client:
        while not stop.is_set():
            wanted = {
                "request_id": f"client={number}/request={len(asked)}",
                "prompts": [{"prompt": f"q{i}"} for i in range(dice.randint(1, 12))],
                "n": dice.randint(1, 4),
                "reward": {"name": "length"},
                "stream": True,
            }
            asked.append(wanted)
            findings.num_samples_wanted += len(wanted["prompts"]) * wanted["n"]
            try:
                async with asyncio.timeout(HANG_S):
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(follow(client, wanted, findings))
                        if dice.random() < 0.2:
                            name = wanted["request_id"]
                            tasks.create_task(delete(client, name, dice.uniform(0.02, 0.3)))
            except TimeoutError:
                findings.problems.append(f"{wanted['request_id']} hung for {HANG_S} s")
                break
    return asked


async def fetch_all(
    server: KilledServer, asked: list[dict[str, Any]], findings: Findings
) -> dict[str, float]:
    """After one more life: every result again by GET, and the books of the server."""
    async with httpx.AsyncClient(base_url=server.url, timeout=HANG_S) as client:
        for wanted in asked:
            name = wanted["request_id"]
            status = (await client.get(f"/v1/rollouts/{name}")).json()
            if status.get("state") != "finished":
                findings.problems.append(f"{name} is {status}")
                continue
            for group in status["result"]["groups"]:
                findings.see(name, group)
            findings.settle(wanted, name)
        text = (await client.get("/metrics")).text
    return {
        line.split()[0].removeprefix("slipstream_"): float(line.split()[1])
        for line in text.splitlines()
        if line.startswith(("slipstream_samples_", "slipstream_pending_samples "))
    }


def check_books(findings: Findings, books: dict[str, float]) -> None:
    """What the server says of all its lives against what the clients have."""
    expected = {
        "samples_accepted_total": findings.num_samples_wanted,
        "samples_delivered_total": findings.num_delivered,
        "samples_cancelled_total": findings.num_cancelled,
        "samples_failed_total": 0,
        "pending_samples": 0,
        "samples_unaccounted": 0,
    }
    if books != expected:
        findings.problems.append(f"the books say {books}, the clients have {expected}")


async def run(directory: Path, *, num_kills: int, num_clients: int, seed: int) -> Findings:
    """Kill the server at random moments; now and then stop it instead."""
    dice = random.Random(seed)
    findings = Findings()
    server = KilledServer(directory)
    stop = asyncio.Event()
    await server.start()
    try:
        clients = [
            asyncio.create_task(one_client(server, number, stop, findings, seed))
            for number in range(num_clients)
        ]
        while findings.num_kills < num_kills:
            await asyncio.sleep(dice.uniform(0.02, 0.8))
            is_stop = dice.random() < 0.15
            findings.num_stops += is_stop
            findings.num_kills += not is_stop
            await asyncio.to_thread(server.end, signal.SIGTERM if is_stop else signal.SIGKILL)
            await server.start()
        stop.set()
        asked = [wanted for part in await asyncio.gather(*clients) for wanted in part]
        server.end(signal.SIGKILL)
        findings.num_kills += 1
        await server.start()
        check_books(findings, await fetch_all(server, asked, findings))
    finally:
        server.end(signal.SIGKILL)
    for wrong in ("is damaged", "Traceback", "cannot be written"):
        if wrong in server.log():
            findings.problems.append(f"the server's log has {wrong!r}")
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        findings = asyncio.run(
            run(
                Path(directory),
                num_kills=arguments.kills,
                num_clients=arguments.clients,
                seed=arguments.seed,
            )
        )
    for problem in findings.problems:
        print(problem)
    figures = {
        "kills": findings.num_kills,
        "stops": findings.num_stops,
        "samples": findings.num_samples_wanted,
        "delivered": findings.num_delivered,
        "cancelled": findings.num_cancelled,
        "problems": len(findings.problems),
    }
    print(json.dumps({"server_kills": figures}))
    sys.exit(bool(findings.problems))


if __name__ == "__main__":
    main()
