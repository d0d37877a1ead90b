"""Processes of a real server die while it generates, scores, takes pushes, scales and drains.

Two engines with a tiny model, or one more while it is scaled up. Clients post groups all the time
(``checked_clients``). What is killed has to be noticed and replaced, what is only slow has to stay,
and every request has to be answered once, in full.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.chaos.checked_clients import HANG_S, NUM_TOKENS, CheckedClients, unaccounted
from tests.chaos.engine_processes import core_of, halt, is_gone, scoring_workers, slow_down
from tests.chaos.schedule import KILLED_ENGINES, LOST_ENGINES, SPARED_ENGINES, Moment, Victim
from tests.support.cluster_nodes import ClusterNodes
from tests.support.models import greedy_reference, make_model, random_prompts
from tests.support.push_process import await_push, start_push
from tests.support.rollout_checks import metrics_of
from tests.support.server_process import START_TIMEOUT_S, ServerProcess, wait_until

NUM_ENGINES = 2
NUM_PROMPTS = 6
PUSH_WINDOW_S = 0.2
"""A push of the tiny model takes about half of it."""
LIVING = frozenset({"serving", "paused", "syncing", "draining"})
"""States of engines that nobody has found dead."""


@dataclass(kw_only=True, slots=True)
class KillCounts:
    """What a run adds up to, beside what its clients saw."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    replaced_though_alive: int = 0
    """Engines that were only slow, and are gone."""
    committed_pushes: int = 0
    leftover_processes: int = 0
    leftover_files: int = 0
    """In shared memory."""
    unaccounted: int = 0
    detection_s: list[float] = field(default_factory=list)
    """From a kill to the server's finding it."""
    frozen_detection_s: list[float] = field(default_factory=list)
    """Of processes that were stopped: status timeouts are in it."""
    recovery_s: list[float] = field(default_factory=list)
    """From a kill to as many engines as are asked for."""
    beyond_start_s: list[float] = field(default_factory=list)
    """Of that, what was not the start of the engine that came in its place."""


class EngineKillRun:
    """One server that is killed in part, and comes back, again and again."""

    def __init__(self, directory: Path, seed: int, nodes: ClusterNodes | None = None) -> None:
        self._directory = directory
        self._random = random.Random(seed)
        self._nodes = nodes
        self.counts = KillCounts()
        self._models = [make_model(directory / f"model-{p}", seed=60 + p) for p in (0, 1)]
        prompts = random_prompts(NUM_PROMPTS, seed=seed)
        expected = [greedy_reference(model, prompts, NUM_TOKENS) for model in self._models]
        self._version = 0
        self._target = NUM_ENGINES
        self._num_drains = 0
        self._pusher: subprocess.Popen[str] | None = None
        self._families: list[psutil.Process] = []
        self._settings = _settings(nodes)
        self._server = self._start()
        self.url = str(self._server.client.base_url).rstrip("/")
        self.clients = CheckedClients(self.url, prompts, expected)
        self.clients.start()

    def _start(self) -> ServerProcess:
        return ServerProcess(self._directory, self._models[0], self._settings)

    def kill_once(self, victim: Victim, moment: Moment) -> None:
        """Kill in the middle of something, wait until it is noticed, and until all is as before."""
        engines = self.engines()
        with self._in_the_middle_of(moment, engines) as leaving:
            name = self._choose(engines, leaving)
            started = time.monotonic()
            self._strike(victim, engines[name])
            self.counts.kills[victim] += 1
            self.counts.moments[moment] += 1
            if victim in LOST_ENGINES and leaving is None and moment is not Moment.SCALING:
                self._await_detection(victim, name, started)
            wait_until(self.is_whole, START_TIMEOUT_S, f"{self._target} engines to serve again")
            recovery_s = time.monotonic() - started
        if victim in KILLED_ENGINES and moment in (Moment.GENERATING, Moment.PUSHING):
            self._note_recovery(recovery_s, engines.keys())
        if victim in SPARED_ENGINES and name not in self._serving():
            self.counts.replaced_though_alive += 1
        print(
            f"kill {self.counts.kills.total()}: {victim} while {moment}, back after "
            f"{recovery_s:.1f} s, {self.clients.counts.checked} samples checked",
            file=sys.stderr,
        )

    @contextlib.contextmanager
    def _in_the_middle_of(
        self, moment: Moment, engines: dict[str, dict[str, Any]]
    ) -> Iterator[str | None]:
        """Begin something, and see to its end. Yields the engine that leaves, if one drains."""
        leaving = None
        if moment is Moment.PUSHING:
            self._begin_push()
        elif moment is Moment.SCALING:
            self._target = NUM_ENGINES + 1 if self._target == NUM_ENGINES else NUM_ENGINES
            self._scale()
            time.sleep(self._random.uniform(0.0, 2.0))
        elif moment is Moment.DRAINING:
            leaving = self._random.choice(sorted(engines))
            answer = self._server.client.post(f"/v1/engines/{leaving}/drain", json={})
            assert answer.status_code == 200, answer.text
            time.sleep(self._random.uniform(0.0, 0.5))
        else:
            time.sleep(self._random.uniform(0.0, 1.0))
        yield leaving
        if self._pusher is not None:
            self._end_push(self._pusher)
            self._pusher = None

    def _scale(self) -> None:
        answer = self._server.client.put("/v1/engines", json={"count": self._target})
        assert answer.status_code == 200, answer.text

    def _begin_push(self) -> None:
        version = self._version + 1
        encoding = self._random.choice(("full", "delta"))
        model = self._models[version % 2]
        self._pusher = start_push(self.url, model, version, self._version, encoding)
        await_push(version)
        time.sleep(self._random.uniform(0.0, PUSH_WINDOW_S))

    def _end_push(self, pusher: subprocess.Popen[str]) -> None:
        answer, _ = pusher.communicate(timeout=HANG_S)
        committed = self._server.client.get("/v1/weights").json()["committed_version"]
        assert committed in (self._version, self._version + 1), committed
        assert answer.strip() != "200" or committed == self._version + 1, "answered, not committed"
        self.counts.committed_pushes += committed - self._version
        self._version = committed

    def _choose(self, engines: dict[str, dict[str, Any]], leaving: str | None) -> str:
        """Which engine is hit; every other time that one which leaves."""
        self._num_drains += leaving is not None
        if leaving is not None and self._num_drains % 2:
            return leaving
        return self._random.choice(sorted(engines.keys() - {leaving}))

    def _strike(self, victim: Victim, engine: dict[str, Any]) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # a drained engine may have gone by itself
            actor = psutil.Process(engine["pid"])
            family = [actor, *actor.children(recursive=True)]
            if victim is Victim.ENGINE:
                actor.kill()
            elif victim is Victim.ENGINE_CORE:
                core_of(actor).kill()
            elif victim is Victim.FROZEN_ENGINE_CORE:
                core_of(actor).suspend()
            elif victim is Victim.HALTED_ENGINE_CORE:
                halt(core_of(actor))
            elif victim is Victim.SLOW_ENGINE_CORE:
                slow_down(core_of(actor))
            if victim in LOST_ENGINES:
                self._families += family
        if victim is Victim.SCORING_WORKER:
            self._random.choice(scoring_workers(self._server.pid)).kill()
        elif victim is Victim.TRAINER and self._pusher is not None:
            self._pusher.kill()
        elif victim is Victim.RAYLET and self._nodes is not None:
            self._nodes.kill_raylet(engine["node_id"])
            self._nodes.add(1)
        elif victim is Victim.SERVER:
            self._restart_server()

    def _restart_server(self) -> None:
        started = time.monotonic()
        self._server.kill()
        self._server = self._start()
        self._target = NUM_ENGINES  # what it is configured with
        self.clients.excuse(time.monotonic() - started)

    def _await_detection(self, victim: Victim, name: str, started: float) -> None:
        wait_until(lambda: name not in self._serving(LIVING), HANG_S, f"{name} to be found dead")
        frozen = victim is Victim.FROZEN_ENGINE_CORE
        found = self.counts.frozen_detection_s if frozen else self.counts.detection_s
        found.append(time.monotonic() - started)

    def _note_recovery(self, recovery_s: float, before: Set[str]) -> None:
        self.counts.recovery_s.append(recovery_s)
        starts = [e["start_up_s"] for name, e in self.engines().items() if name not in before]
        if starts:
            self.counts.beyond_start_s.append(recovery_s - max(starts))

    def is_whole(self) -> bool:
        """As many engines as are asked for, and none that leaves."""
        return len(self._serving(LIVING)) == len(self._serving()) == self._target

    def engines(self) -> dict[str, dict[str, Any]]:
        """All engines; one serves a moment before its status tells its pid."""
        known: dict[str, dict[str, Any]] = {}

        def are_known() -> bool:
            known.clear()
            known.update((n, e) for n, e in self._serving().items() if e["pid"] is not None)
            return len(known) == self._target

        wait_until(are_known, HANG_S, "the status of every engine to name its pid")
        return known

    def _serving(self, states: frozenset[str] = frozenset({"serving"})) -> dict[str, Any]:
        """Engines in these states by id; none while the server does not answer."""
        try:
            engines = self._server.client.get("/v1/engines", timeout=10).json()["engines"]
        except httpx.HTTPError:
            return {}
        return {engine["engine_id"]: engine for engine in engines if engine["state"] in states}

    def close(self) -> None:
        """Let the clients finish, look into the books, then stop the server well."""
        self.clients.finish()
        metrics = metrics_of(self._server.client.get("/metrics").text)
        self.counts.unaccounted = unaccounted(metrics, self.clients.counts.checked)
        family = psutil.Process(self._server.pid).children(recursive=True)
        self._server.stop()
        _, alive = psutil.wait_procs([*self._families, *family], timeout=30)
        self.counts.leftover_processes += len([p for p in alive if not is_gone(p)])

    def abandon(self) -> None:
        """After an error: leave no server, and do not hide the error."""
        self.clients.end()
        for process in self._families:  # some may be stopped, and would stay so
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        self._server.kill()


def _settings(nodes: ClusterNodes | None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "engine": {
            "count": NUM_ENGINES,
            "max_count": NUM_ENGINES + 1,
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
    if nodes is not None:
        placed = nodes.settings()
        settings = {**settings, **placed, "engine": settings["engine"] | placed["engine"]}
    return settings


def _free_port() -> int:
    """The same for every start of the server, so that clients find it again."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
