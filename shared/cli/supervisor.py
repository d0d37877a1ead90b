"""``slipstream run``: server and trainer as children, one after the other, and both ended."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import httpx
import typer

from shared.cli.processes import ChildProcess, file_tail, wait_for_exit
from shared.cli.run_access import prepare_run_access
from shared.cli.run_directory import SERVER_FILE, claim_run_directory, write_config
from shared.config.run import RunConfig
from shared.config.trainer import ArithmeticTaskConfig
from shared.credentials import ClientCredentials, is_untrusted_certificate
from shared.errors import SlipstreamError

POLL_S = 0.2
STOP_MARGIN_S = 15.0
"""Added to ``server.shutdown_timeout_s``: Ray itself needs a moment after the server is done."""
VIEW_TIMEOUT_S = 30.0
REPORT_TIMEOUT_S = 300.0
MODEL_TIMEOUT_S = 3600.0


class RunFailedError(SlipstreamError):
    """One of the processes of a run ended with an error or was not ready in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerAddress:
    """What the server writes into ``server.json`` once it listens."""

    url: str
    ray_address: str | None


class Supervisor:
    """Runs one job in the order model, server, trainer, report. A context manager: on leaving,
    whatever it started is stopped, the latest first."""

    def __init__(self, config: RunConfig, *, resume: bool, talks_on_stderr: bool = False) -> None:
        """
        Args:
            talks_on_stderr: children without a log write what they say to stderr.
        """
        self._output = sys.stderr.fileno() if talks_on_stderr else None
        self._access = prepare_run_access(config, os.environ)
        self.config = claim_run_directory(config, resume=resume)
        self.run_dir = self.config.run_dir
        self._resume = resume
        self._children: list[ChildProcess] = []
        self._stop_timeout_s = config.server.shutdown_timeout_s + STOP_MARGIN_S
        # A cluster that exists already has rules of its own.
        self._environment = {} if config.ray.address else ray_environment(os.environ)
        self._old_sigterm = signal.getsignal(signal.SIGTERM)

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, _raise_interrupt)
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A second Ctrl-C while stopping would leave engines behind.
        old_sigint = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self.stop_all()
        finally:
            signal.signal(signal.SIGINT, old_sigint)
            signal.signal(signal.SIGTERM, self._old_sigterm)

    def stop_all(self) -> None:
        """Stop every child, the latest first."""
        while self._children:
            self._children[-1].stop(self._stop_timeout_s)
            self._children.pop()

    def make_model(self) -> None:
        """Create ``model.path`` when it is missing and ``demo_model`` says how."""
        demo, path = self.config.demo_model, Path(self.config.model.path)
        if demo is None or (path / "config.json").exists():
            return
        typer.echo(f"making the model {path} ({demo.preset}), once", err=True)
        arguments = [
            *("--output", str(path), "--preset", demo.preset),
            *("--warm-start-steps", str(demo.warm_start_steps), "--seed", str(demo.seed)),
        ]
        task = self.config.trainer.task
        if isinstance(task, ArithmeticTaskConfig):
            # It starts from the problems it will be trained on.
            arguments += ["--num-terms", *map(str, task.num_terms)]
            arguments += ["--max-operand", str(task.max_operand)]
        child = self._start("make-model", "trainer.demo_model", arguments, None)
        code = wait_for_exit(child, time.monotonic() + MODEL_TIMEOUT_S, POLL_S)
        self._finish(child, code, f"still making {path} after {MODEL_TIMEOUT_S:g} s")

    def start_server(self) -> ServerAddress:
        """Start the server and return its address once it is ready for requests."""
        # The run ends with its server: the trainer's checkpoint is what a resumed one goes on from,
        # and it asks anew for the rollouts of the step.
        weights = self.config.weights.model_copy(update={"keep_on_stop": False})
        # Nobody is left to wait for rollouts whose trainer has ended.
        api = self.config.server.model_copy(update={"ledger": False, "drain_timeout_s": 0.0})
        config = self.config.model_copy(update={"weights": weights, "server": api})
        config_path = write_config(config, self.run_dir / "config.yaml")
        log_path = self.run_dir / "server.log"
        server = self._start(
            "server",
            "rollout_server",
            ["--config", str(config_path)],
            log_path,
            self._access.server_environment,
        )
        timeout_s = self.config.engine.start_timeout_s * max(1, self.config.engine.total_count)
        deadline = time.monotonic() + timeout_s
        address: ServerAddress | None = None
        while time.monotonic() < deadline:
            if (code := server.poll()) is not None:
                raise RunFailedError(
                    _failure(server, f"ended with code {code} before it was ready")
                )
            if address is None:
                address = read_server_file(self.run_dir / SERVER_FILE)
            elif is_ready(address.url, self._access.credentials):
                return address
            time.sleep(POLL_S)
        waited_for = "/readyz" if address else SERVER_FILE
        raise RunFailedError(
            _failure(server, f"not ready after {timeout_s:g} s, waiting for {waited_for} "
                     "(engine.start_timeout_s times the number of engines)")
        )  # fmt: skip

    def train(self, address: ServerAddress) -> None:
        """Run the trainer to its end with the live view beside it."""
        trainer_config = self.config.model_copy(
            update={
                "trainer": self.config.trainer.model_copy(update={"server_url": address.url}),
                "ray": self.config.ray.model_copy(update={"address": address.ray_address}),
            }
        )
        config_path = write_config(trainer_config, self.run_dir / "trainer.yaml")
        arguments = ["--config", str(config_path), *(["--resume"] if self._resume else [])]
        server = self._children[-1]
        trainer = self._start(
            "trainer",
            "trainer",
            arguments,
            self.run_dir / "trainer.log",
            self._access.trainer_environment,
        )
        view_arguments = [str(self.run_dir), "--pid", str(trainer.pid)]
        view = self._start("live view", "trainer.progress", view_arguments, None)
        while (code := trainer.poll()) is None:
            if server.poll() is not None:
                raise RunFailedError(_failure(server, "ended while the trainer was running"))
            time.sleep(POLL_S)
        # It sees the trainer gone and shows the last step.
        view.wait(VIEW_TIMEOUT_S)
        view.stop(1.0)
        self._children.remove(view)
        self._finish(trainer, code, "")

    def build_report(self) -> None:
        """Write plots, ``report.html`` and ``summary.json``; its summary goes to the terminal."""
        child = self._start("report", "trainer.report", [str(self.run_dir)], None)
        code = wait_for_exit(child, time.monotonic() + REPORT_TIMEOUT_S, POLL_S)
        self._finish(child, code, f"no report after {REPORT_TIMEOUT_S:g} s")

    def _start(
        self,
        name: str,
        module: str,
        arguments: list[str],
        log_path: Path | None,
        secrets_of_child: Mapping[str, str] | None = None,
    ) -> ChildProcess:
        environment = self._environment | dict(secrets_of_child or {})
        child = ChildProcess(name, module, arguments, log_path, environment, self._output)
        self._children.append(child)
        return child

    def _finish(self, child: ChildProcess, code: int | None, late: str) -> None:
        if code != 0:
            raise RunFailedError(_failure(child, late if code is None else f"failed, code {code}"))
        child.stop(0.0)
        self._children.remove(child)


def ray_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that let the trainer join the Ray cluster the server starts, and nobody else.

    Ray asks for a token on a cluster it starts itself, but a process that joins by address only
    sends one when its environment says so. A mode the user has chosen is left alone.
    """
    if "RAY_AUTH_MODE" in environment:
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def read_server_file(path: Path) -> ServerAddress | None:
    """The address in ``server.json``; None while it is absent or half written."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return ServerAddress(url=str(data["url"]), ray_address=data.get("ray_address"))


def is_ready(url: str, credentials: ClientCredentials) -> bool:
    """Whether ``/readyz`` answers 200.

    Raises:
        RunFailedError: the server's certificate is not trusted, which no waiting will change.
    """
    try:
        verify = credentials.verification()
        return httpx.get(f"{url}/readyz", timeout=5.0, verify=verify).status_code == 200
    except httpx.ConnectError as exc:
        if is_untrusted_certificate(exc):
            raise RunFailedError(
                f"the certificate of {url} is not trusted ({exc}): set trainer.ca_file to the "
                "authority of server.tls_certificate_file, which has to name this host"
            ) from exc
        return False
    except httpx.HTTPError:
        return False


def _failure(child: ChildProcess, what: str) -> str:
    if child.log_path is None:
        return f"{child.name} {what}"
    tail = file_tail(child.log_path, 20)
    return f"{child.name} {what}; the end of {child.log_path}:\n{tail}"


def _raise_interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
