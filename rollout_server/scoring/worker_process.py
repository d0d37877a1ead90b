"""The pool's side of one worker process: start it, ask it, kill it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from rollout_server.scoring.confinement import WorkerLimits, kill_descendants
from rollout_server.scoring.frames import (
    LENGTH_NUM_BYTES,
    decode_body,
    encode_frame,
    frame_num_bytes,
)
from rollout_server.scoring.signature import RewardSignature
from shared.api_keys import KEYS_VARIABLE
from shared.credentials import KEY_FILE_VARIABLE, KEY_VARIABLE
from shared.errors import ConfigurationError, ScoringError

logger = logging.getLogger(__name__)

SECRET_VARIABLES = frozenset({KEYS_VARIABLE, KEY_VARIABLE, KEY_FILE_VARIABLE, "RAY_AUTH_TOKEN"})
START_TIMEOUT_S = 60.0
"""For a worker to start and import the user's rewards, on a machine that is busy with engines."""
REAP_TIMEOUT_S = 10.0
"""For the kernel to end a process after SIGKILL."""


class WorkerCrashError(Exception):
    """The process ended, or broke the protocol, while it held a job. The message says how."""


class WorkerProcess:
    """One process and its two pipes. Not reusable: a dead one is replaced by a new instance."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._is_killed = False

    @classmethod
    async def start(
        cls, rewards: Mapping[str, str], limits: WorkerLimits
    ) -> tuple[WorkerProcess, dict[str, RewardSignature]]:
        """Start a worker and wait until it has imported everything.

        Args:
            rewards: user rewards, name to ``module:function``.
            limits: what the worker puts on itself before it imports them.

        Returns:
            The worker and the signatures of the user rewards.

        Raises:
            ConfigurationError: a user reward cannot be imported or has an impossible signature.
            ScoringError: the process did not come up.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "rollout_server.scoring.worker",
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
                # Its own process group: a kill reaches what a reward has started, and Ctrl-C at
                # the terminal leaves the order of shutting down to the server.
                start_new_session=True,
            )
        except OSError as exc:
            raise ScoringError(f"a scoring worker cannot be started: {exc}") from exc
        worker = cls(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                setup = {"rewards": dict(rewards), "limits": limits.to_json()}
                hello = await worker.ask(encode_frame(setup))
            if "refused" in hello:
                raise ConfigurationError(
                    f"scoring.network, scoring.max_memory_mib or scoring.max_cpu_s cannot be put "
                    f"on a scoring worker here: {hello['refused']}",
                    param="scoring",
                )
            if "failed" in hello:
                name = hello["failed"]
                raise ConfigurationError(
                    f"scoring.rewards.{name}: {rewards[name]!r} is not a usable reward: "
                    f"{hello['error']}",
                    param=f"scoring.rewards.{name}",
                )
        except (TimeoutError, WorkerCrashError) as exc:
            await worker.kill()
            what = str(exc) or f"it was not ready within {START_TIMEOUT_S:g} s"
            raise ScoringError(f"a scoring worker did not start: {what}") from exc
        except BaseException:
            await worker.kill()
            raise
        signatures = {
            name: RewardSignature.from_json(data) for name, data in hello["signatures"].items()
        }
        return worker, signatures

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Alive now. Asks the kernel: asyncio learns of an end with a delay."""
        if self._is_killed or self._process.returncode is not None:
            return False
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # ended, and asyncio has reaped it already
            return False
        return ended is None

    async def ask(self, frame: bytes) -> dict[str, Any]:
        """Send one frame and wait for one answer, as below."""
        await self.send(frame)
        return await self.receive()

    async def send(self, frame: bytes) -> None:
        """Hand one frame over. The caller sets the time limit, and receives all the answers.

        After a cancellation of either the worker still owes answers: kill it.

        Raises:
            WorkerCrashError: the process has ended.
        """
        stdin = self._process.stdin
        assert stdin is not None, "started with a pipe"
        try:
            stdin.write(frame)
            await stdin.drain()
        except OSError as exc:
            raise WorkerCrashError(await self._obituary()) from exc

    async def receive(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            WorkerCrashError: the process ended or answered nonsense.
        """
        stdout = self._process.stdout
        assert stdout is not None, "started with a pipe"
        try:
            prefix = await stdout.readexactly(LENGTH_NUM_BYTES)
            return decode_body(await stdout.readexactly(frame_num_bytes(prefix)))
        except (OSError, EOFError) as exc:
            raise WorkerCrashError(await self._obituary()) from exc
        except ValueError as exc:
            raise WorkerCrashError(f"the worker broke the protocol: {exc}") from exc

    async def kill(self) -> None:
        """End the process and whatever it has started. Never raises; may be called again."""
        if not self._is_killed:
            self._is_killed = True  # once: the number may belong to somebody else afterwards
            if self._process.returncode is None:  # else its number may be somebody else's
                kill_descendants(self._process.pid)  # some may have left its group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is not None:
            stdin.close()
        try:
            async with asyncio.timeout(REAP_TIMEOUT_S):
                await self._process.wait()
                if stdout is not None:  # to its end, so that asyncio closes the pipe
                    await stdout.read()
        except TimeoutError:
            logger.error(
                "scoring worker %d did not end within %g s of SIGKILL",
                self._process.pid,
                REAP_TIMEOUT_S,
            )

    async def _obituary(self) -> str:
        """How the process ended; it may have closed its pipe just before it does."""
        try:
            async with asyncio.timeout(REAP_TIMEOUT_S):
                code = await self._process.wait()
        except TimeoutError:
            return "the worker closed its pipe"
        if code < 0:
            limit = " (scoring.max_cpu_s)" if -code == signal.SIGXCPU else ""
            return f"the worker was ended by {_signal_name(-code)}{limit}"
        return f"the worker ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX has no name
        return f"signal {number}"


def _environment() -> dict[str, str]:
    """Let the worker import what the parent can, then what lies in the working directory; but
    keep from it the keys to the API and to the Ray cluster."""
    path = [entry or os.getcwd() for entry in sys.path]
    kept = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
    return {**kept, "PYTHONPATH": os.pathsep.join([*path, os.getcwd()])}
