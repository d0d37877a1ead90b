"""Processes of a real server die while it generates, scores and takes pushes.

Two engines with a tiny model. Clients post groups all the time; every sample that comes back is
compared with what its prompt leads to under the weights it says it was made with. What is killed
has to be noticed and replaced, and every request has to be answered once, in full.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from shared.client import RolloutClient, rollout_request
from shared.errors import SlipstreamError
from shared.schemas.rollouts import RolloutGroup, RolloutRequest, SamplingOptions
from tests.support.models import greedy_reference, make_model, random_prompts
from tests.support.server_process import START_TIMEOUT_S, ServerProcess, wait_until

NUM_ENGINES = 2
NUM_CLIENTS = 3
NUM_TOKENS = 160
NUM_SAMPLES = 1
"""Greedy sampling has one."""
NUM_PROMPTS = 4
PUSH_EVERY = 5
"""Kills between two pushes."""
HANG_S = 60.0
"""Longest a request may take while the service can serve; outages are not counted in."""
VICTIMS = ("engine", "engine core", "scoring worker", "frozen engine core", "server")
ENGINES = frozenset({"engine", "engine core", "frozen engine core"})


@dataclass(kw_only=True, slots=True)
class EngineKillCounts:
    """What a run adds up to."""

    kills: Counter[str] = field(default_factory=Counter)
    checked_samples: int = 0
    lost: int = 0
    duplicated: int = 0
    mixed_version: int = 0
    wrong_tokens: int = 0
    hangs: int = 0
    detection_s: list[float] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)


class EngineKillRun:
    """One server that is killed in part, and comes back, again and again."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._random = random.Random(seed)
        self.counts = EngineKillCounts()
        self._models = [make_model(directory / f"model-{p}", seed=60 + p) for p in (0, 1)]
        self._prompts = random_prompts(6, seed=seed)
        self._expected = [
            greedy_reference(model, self._prompts, NUM_TOKENS) for model in self._models
        ]
        self._version = 0
        self._settings: dict[str, Any] = {
            "engine": {
                "count": NUM_ENGINES,
                "cpu_cores": ["0", "1"],
                "num_kv_blocks": 100,
                "block_size": 32,
                "max_num_seqs": 16,
                "progress_timeout_s": 10,
                "status_timeout_s": 3,
                "restart_budget": 1000,
            },
            "scoring": {"num_workers": 1},
            "server": {
                "port": _free_port(),
                "engine_wait_timeout_s": 120,
                "progress_interval_s": 0.2,
            },
        }
        self._server = self._start()
        self._outage_s = 0.0
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(number,), daemon=True)
            for number in range(NUM_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _start(self) -> ServerProcess:
        return ServerProcess(self._directory, self._models[0], self._settings)

    def kill_once(self, victim: str) -> None:
        """Kill, wait until it is noticed, and until as many engines serve as before."""
        name, pid = self._find(victim, self._known_engines())
        time.sleep(self._random.uniform(0.0, 1.0))
        started = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if victim.startswith("frozen") else signal.SIGKILL)
        self.counts.kills[victim] += 1
        if victim in ENGINES:
            wait_until(lambda: name not in self._serving(), HANG_S, f"{name} to be found dead")
            self.counts.detection_s.append(time.monotonic() - started)
        elif victim == "server":
            self._server.kill()
            self._server = self._start()
            with self._lock:
                self._outage_s += time.monotonic() - started
        wait_until(
            lambda: len(self._serving()) == NUM_ENGINES, START_TIMEOUT_S, "engines to serve again"
        )
        recovery_s = time.monotonic() - started
        self.counts.recovery_s.append(recovery_s)
        total = self.counts.kills.total()
        if total % PUSH_EVERY == 0:
            self._push()
        print(
            f"kill {total}: {victim}, back after {recovery_s:.1f} s, "
            f"{self.counts.checked_samples} samples checked",
            file=sys.stderr,
        )

    def _push(self) -> None:
        version = self._version + 1
        answer = self._server.publish(self._models[version % 2], version, self._version)
        assert answer.status_code == 200, answer.text
        self._version = version

    def _known_engines(self) -> dict[str, int]:
        """Pids of all engines; an engine serves a moment before its status tells its pid."""
        known: dict[str, int] = {}

        def are_known() -> bool:
            known.clear()
            known.update((name, pid) for name, pid in self._serving().items() if pid is not None)
            return len(known) == NUM_ENGINES

        wait_until(are_known, HANG_S, "the status of every engine to name its pid")
        return known

    def _serving(self) -> dict[str, int | None]:
        """Pids of the engines that serve, by id; none while the server does not answer."""
        try:
            engines = self._server.client.get("/v1/engines", timeout=10).json()["engines"]
        except httpx.HTTPError:
            return {}
        return {
            engine["engine_id"]: engine["pid"] for engine in engines if engine["state"] == "serving"
        }

    def _find(self, victim: str, engines: dict[str, int]) -> tuple[str, int]:
        if victim == "server":
            return "", self._server.pid
        if victim == "scoring worker":
            family = psutil.Process(self._server.pid).children(recursive=True)
            workers = [p.pid for p in family if "rollout_server.scoring" in " ".join(_command(p))]
            return "", self._random.choice(workers)
        name, actor = self._random.choice(sorted(engines.items()))
        if victim == "engine":
            return name, actor
        children = psutil.Process(actor).children(recursive=True)
        cores = [child.pid for child in children if "EngineCore" in child.name()]
        assert cores, f"{name} has no engine core, only {[child.name() for child in children]}"
        return name, self._random.choice(cores)

    def _client(self, number: int) -> None:
        choose = random.Random(number)
        client = RolloutClient(str(self._server.client.base_url), timeout_s=START_TIMEOUT_S)
        for serial in itertools.count():
            if self._is_over.is_set():
                break
            indices = choose.sample(range(len(self._prompts)), NUM_PROMPTS)
            request = rollout_request(
                [self._prompts[index] for index in indices],
                request_id=f"c{number}-{serial}-{os.getpid()}",
                n=NUM_SAMPLES,
                sampling=SamplingOptions(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
                reward="exact_match",
            )
            self._one(client, request, indices)
        client.close()

    def _one(self, client: RolloutClient, request: RolloutRequest, indices: list[int]) -> None:
        started, outage_s = time.monotonic(), self._outage_s
        try:
            groups = client.rollout(request).groups
        except SlipstreamError as exc:
            print(f"request {request.request_id} failed: {exc}", file=sys.stderr)
            with self._lock:
                self.counts.lost += NUM_SAMPLES * len(indices)
            return
        took_s = time.monotonic() - started - (self._outage_s - outage_s)
        with self._lock:
            self.counts.hangs += took_s > HANG_S
            for index, group in zip(indices, groups, strict=True):
                self._check(index, group)

    def _check(self, index: int, group: RolloutGroup) -> None:
        numbers = [sample.sample_index for sample in group.samples]
        self.counts.lost += len(set(range(NUM_SAMPLES)) - set(numbers))
        self.counts.duplicated += len(numbers) - len(set(numbers))
        for sample in group.samples:
            self.counts.checked_samples += 1
            spans = sample.weight_versions
            covered = [i for span in spans for i in range(span.start, span.end)]
            versions = [span.version for span in spans]
            if covered != list(range(NUM_TOKENS)) or versions != sorted(set(versions)):
                self.counts.mixed_version += 1
            # Up to the end of its first span a sample is that version's, token for token.
            expected = self._expected[versions[0] % 2][index]
            if sample.token_ids[: spans[0].end] != expected[: spans[0].end]:
                self.counts.wrong_tokens += 1

    def close(self) -> None:
        """Let the clients finish, then stop the server well."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(HANG_S)
            self.counts.hangs += thread.is_alive()
        self._server.stop()

    def abandon(self) -> None:
        """After an error: leave no server, and do not hide the error."""
        self._is_over.set()
        self._server.kill()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _free_port() -> int:
    """The same for every start of the server, so that clients find it again."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
