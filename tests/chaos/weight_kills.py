"""Kills processes inside the update window of a real server, and looks at what is served then.

Every version has one of two contents, by its parity, so that a greedy sample tells which weights it
was made with. While pushes and kills go on, other requests run all the time, and every sample that
comes back is held against the version it says.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.models import greedy_reference, make_model, random_prompts
from tests.support.push_process import await_push, start_push
from tests.support.server_process import START_TIMEOUT_S, ServerProcess, wait_until

NUM_TOKENS = 48
NUM_TIMED_PUSHES = 5
"""Nothing is killed in the first ones: how long they take is how long the window is."""
WINDOW_SHARE = 1.1
"""Kills fall into every phase, a few of them behind the last."""
HANG_S = 60.0
VICTIMS = ("engine", "engine core", "trainer", "server")


@dataclass(kw_only=True, slots=True)
class Counts:
    """What a run adds up to."""

    kills: Counter[str] = field(default_factory=Counter)
    kills_inside: Counter[str] = field(default_factory=Counter)
    """Those that struck before the push had its answer."""
    committed_pushes: int = 0
    checked_samples: int = 0
    wrong_version_samples: int = 0
    half_loaded: int = 0
    """Engines that served other weights than those of the committed version."""
    hangs: int = 0


class KillRun:
    """One server that is killed in part, and comes back, again and again."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._generator = random.Random(seed)
        self.counts = Counts()
        self._models = [make_model(directory / f"model-{p}", seed=40 + p) for p in (0, 1)]
        self._prompts = random_prompts(4, seed=seed)
        self._expected = [
            greedy_reference(model, self._prompts, NUM_TOKENS) for model in self._models
        ]
        self._version = 0
        self._settings = {
            "weights": {"lock_timeout_s": 20, "pause_timeout_s": 10, "commit_timeout_s": 10},
            "engine": {"num_kv_blocks": 100, "block_size": 32, "max_num_seqs": 16},
            "server": {"port": 0, "engine_wait_timeout_s": 120},
        }
        self._server = self._start()
        self._window_s = statistics.median(self._time_push() for _ in range(NUM_TIMED_PUSHES))
        print(f"a push takes {self._window_s * 1000:.0f} ms", file=sys.stderr)

    def _start(self) -> ServerProcess:
        return ServerProcess(self._directory, self._models[0], self._settings)

    def kill_once(self, victim: str) -> None:
        """Push, kill the victim at a random moment of it, and check what is served then."""
        new_version = self._version + 1
        pids = self._engine_pids()
        with self._sampling():
            pusher = self._push(new_version)
            await_push(new_version)
            time.sleep(self._generator.uniform(0.0, WINDOW_SHARE * self._window_s))
            assert pusher.stdout is not None
            is_answered = bool(select.select([pusher.stdout.fileno()], [], [], 0)[0])
            self._kill(victim, pids, pusher)
            self.counts.kills[victim] += 1
            self.counts.kills_inside[victim] += not is_answered
            started = time.monotonic()
            try:
                answer, _ = pusher.communicate(timeout=HANG_S)
            except subprocess.TimeoutExpired:
                self.counts.hangs += 1
                pusher.kill()
                answer, _ = pusher.communicate()
            if victim == "server":
                self._server.kill()
                self._server = self._start()
            wait_until(self._is_serving, START_TIMEOUT_S, "an engine to serve again")
            recovery_s = time.monotonic() - started
        self._check(new_version, answer.strip(), recovery_s)

    def _push(self, version: int) -> subprocess.Popen[str]:
        """The trainer: a process that pushes once and prints what it is answered."""
        url, model = str(self._server.client.base_url), self._models[version % 2]
        encoding = self._generator.choice(("full", "delta"))
        return start_push(url, model, version, self._version, encoding)

    def _time_push(self) -> float:
        """Seconds from the first sign of a push to its answer, while requests run."""
        version = self._version + 1
        with self._sampling():
            pusher = self._push(version)
            await_push(version)
            started = time.monotonic()
            assert pusher.stdout is not None
            answer = pusher.stdout.readline().strip()
            took_s = time.monotonic() - started
        pusher.communicate()
        assert answer == "200", answer
        self._version = version
        return took_s

    def _engine_pids(self) -> tuple[int, list[int]]:
        wait_until(self._is_serving, START_TIMEOUT_S, "an engine that says its pid")
        (engine,) = self._server.client.get("/v1/engines").json()["engines"]
        children = psutil.Process(engine["pid"]).children(recursive=True)
        return engine["pid"], [child.pid for child in children]

    def _kill(
        self, victim: str, pids: tuple[int, list[int]], pusher: subprocess.Popen[str]
    ) -> None:
        actor, children = pids
        pid = {
            "engine": actor,
            "engine core": self._generator.choice(children),
            "trainer": pusher.pid,
            "server": self._server.pid,
        }[victim]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _is_serving(self) -> bool:
        """An engine serves, and it is not one that is about to be found dead."""
        try:
            engines = self._server.client.get("/v1/engines").json()["engines"]
            states = [engine["state"] for engine in engines]
            pids = [engine["pid"] for engine in engines]
            if states != ["serving"] or pids[0] is None or not psutil.pid_exists(pids[0]):
                return False
            self._server.greedy(self._prompts[:1], 1)
        except (httpx.HTTPError, AssertionError):
            return False
        return True

    def _check(self, new_version: int, answer: str, recovery_s: float) -> None:
        weights = self._server.client.get("/v1/weights").json()
        committed = weights["committed_version"]
        assert committed in (self._version, new_version), committed
        if answer == "200":
            assert committed == new_version, "an answered push is committed"
        self.counts.committed_pushes += committed == new_version
        samples = self._server.greedy(self._prompts, NUM_TOKENS)
        expected = self._expected[committed % 2]
        versions = {span["version"] for sample in samples for span in sample["weight_versions"]}
        if [s["token_ids"] for s in samples] != expected or versions != {committed}:
            self.counts.half_loaded += 1
        print(
            f"kill {self.counts.kills.total()} (inside: {dict(self.counts.kills_inside)}): "
            f"push {new_version} answered {answer or 'nothing'}, committed {committed}, "
            f"back after {recovery_s:.1f} s",
            file=sys.stderr,
        )
        self._version = committed

    @contextlib.contextmanager
    def _sampling(self) -> Any:
        """Requests all the while; every sample that comes back is checked."""
        done = threading.Event()
        server = self._server

        def sample() -> None:
            while not done.is_set():
                # Engines and the server are killed under these requests: they may fail.
                with contextlib.suppress(httpx.HTTPError, AssertionError):
                    for index, found in enumerate(server.greedy(self._prompts, NUM_TOKENS)):
                        self._check_sample(index, found)

        threads = [threading.Thread(target=sample, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join(START_TIMEOUT_S)

    def _check_sample(self, prompt_index: int, sample: dict[str, Any]) -> None:
        """Up to the end of its first span a sample is that version's, token for token."""
        self.counts.checked_samples += 1
        first = sample["weight_versions"][0]
        expected = self._expected[first["version"] % 2][prompt_index]
        if sample["token_ids"][: first["end"]] != expected[: first["end"]]:
            self.counts.wrong_version_samples += 1

    def close(self) -> None:
        """Stop the server well."""
        self._server.stop()

    def abandon(self) -> None:
        """After an error: leave no server, and do not hide the error."""
        self._server.kill()
