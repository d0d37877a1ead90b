"""Places the trainer actor on a Ray cluster and waits for it. The only Ray code of the trainer."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

import ray

from shared.cli.run_access import trainer_credentials
from shared.config.run import RunConfig
from shared.errors import SlipstreamError
from trainer.actor import TrainerActor
from trainer.status import TrainerPhase

LOGGER = logging.getLogger(__name__)

MAX_CONCURRENCY = 4
"""Threads of the actor: ``run``, and ``status`` and ``stop`` beside it."""
NUM_CPUS = 1
STOP_TIMEOUT_S = 120.0
"""How long a stop may take (an update and its push are finished first)."""
POLL_S = 0.5
MIB = 1024 * 1024


def run_on_ray(config: RunConfig, *, resume: bool) -> TrainerPhase:
    """Run one job to its end in a trainer actor. SIGINT and SIGTERM stop it, a second one kills it.

    Raises:
        ConfigurationError: the configuration cannot be trained with.
        SlipstreamError: training failed, the actor died or did not stop in time.
    """
    # Here and not in the actor, which may run on a machine without the files, and does not have
    # this process's environment.
    credentials = trainer_credentials(config.trainer, os.environ)
    with _cluster(config), _stop_signals() as num_signals:
        actor = (
            ray.remote(TrainerActor)
            .options(
                num_cpus=NUM_CPUS,
                num_gpus=_num_gpus(config),
                max_concurrency=MAX_CONCURRENCY,
            )
            .remote(config, resume=resume, credentials=credentials)
        )
        try:
            return _wait(actor, actor.run.remote(), num_signals)
        finally:
            ray.kill(actor)


def _wait(actor: Any, outcome: Any, num_signals: _SignalCount) -> TrainerPhase:
    stop_deadline_s: float | None = None
    while True:
        done, _ = ray.wait([outcome], timeout=POLL_S)
        if done:
            return _result(outcome)
        if num_signals.value and stop_deadline_s is None:
            LOGGER.info("stopping at the next safe point; once more to end at once")
            actor.stop.remote()
            stop_deadline_s = monotonic() + STOP_TIMEOUT_S
        if num_signals.value > 1:
            return TrainerPhase.STOPPED
        if stop_deadline_s is not None and monotonic() > stop_deadline_s:
            raise SlipstreamError(
                f"the trainer did not reach a safe point within {STOP_TIMEOUT_S:g} s of the stop; "
                "its last checkpoint can be resumed"
            )


def _result(outcome: Any) -> TrainerPhase:
    try:
        return TrainerPhase(ray.get(outcome))
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, SlipstreamError):
            raise exc.cause from None
        raise SlipstreamError(f"the trainer failed with an unexpected error:\n{exc}") from exc
    except ray.exceptions.RayError as exc:
        raise SlipstreamError(f"the trainer's process is gone: {exc}") from exc


def _num_gpus(config: RunConfig) -> int:
    if config.trainer.device == "cpu":
        return 0
    if config.trainer.device == "cuda":
        return 1
    return 1 if ray.available_resources().get("GPU", 0) >= 1 else 0


@contextmanager
def _cluster(config: RunConfig) -> Iterator[None]:
    """Join ``ray.address``, or start a cluster of our own that ends with us."""
    options = config.ray
    try:
        if options.address is not None:
            ray.init(address=options.address, log_to_driver=True)
        else:
            # "local": one that happens to run on this machine is somebody else's.
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=options.num_cpus,
                object_store_memory=options.object_store_mib * MIB,
                log_to_driver=True,
            )
    except (ConnectionError, RuntimeError, ValueError) as exc:
        where = options.address or "a local cluster"
        raise SlipstreamError(f"ray.address: {where} cannot be used: {exc}") from exc
    try:
        yield
    finally:
        ray.shutdown()


class _SignalCount:
    """How many stop signals have come."""

    def __init__(self) -> None:
        self.value = 0

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.value += 1


@contextmanager
def _stop_signals() -> Iterator[_SignalCount]:
    """Count SIGINT and SIGTERM instead of dying of them. After ``ray.init``, which sets its own."""
    count = _SignalCount()
    if threading.current_thread() is not threading.main_thread():
        yield count
        return
    previous = {
        number: signal.signal(number, count.handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield count
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
