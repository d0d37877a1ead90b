"""Metrics for TensorBoard, Weights & Biases and trackio, beside the run's own files.

A sink may be lost, a run may not: one that fails is logged and left alone from then on::

    OPEN ─► FAILED    a write failed, and no other is tried
      └───► CLOSED
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from shared.config.metric_sinks import PACKAGES
from shared.config.run import RunConfig
from shared.errors import ConfigurationError
from shared.types import MetricSinkKind
from trainer.status import MetricsRecord

LOGGER = logging.getLogger(__name__)

TENSORBOARD_DIRECTORY = "tensorboard"
CLOSE_TIMEOUT_S = 30.0
"""For all sinks together, to send what they still have."""
NOT_VALUES = frozenset({"step", "time_s"})
"""Keys of a line that say where its values belong."""


class MetricSink(Protocol):
    """Takes the values of one step after the other. May raise whatever its library raises."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files; what an earlier process wrote of steps that are done again is dropped."""

    def __init__(self, directory: Path, *, completed_steps: int, is_resumed: bool) -> None:
        summary_writer = import_module("torch.utils.tensorboard").SummaryWriter
        # A run that goes on does its later steps again; one that goes on at step 0, that one too:
        # the evaluation before training.
        purge_step = completed_steps + 1 if completed_steps else 0 if is_resumed else None
        self._writer = summary_writer(log_dir=str(directory), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One Weights & Biases run per process; a resumed one joins the group of the first."""

    def __init__(self, config: RunConfig) -> None:
        self._run = import_module("wandb").init(
            project=config.trainer.metric_project,
            name=config.name,
            group=config.name,
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """A run of trackio that a resumed process goes on with."""

    def __init__(self, config: RunConfig) -> None:
        self._trackio = import_module("trackio")
        self._trackio.init(
            project=config.trainer.metric_project,
            name=config.name,
            config=config.model_dump(mode="json"),
            resume="allow",
            embed=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


class SinkState(StrEnum):
    """What becomes of a sink."""

    OPEN = "open"
    FAILED = "failed"
    CLOSED = "closed"


SINK_TRANSITIONS: dict[SinkState, frozenset[SinkState]] = {
    SinkState.OPEN: frozenset({SinkState.FAILED, SinkState.CLOSED}),
    SinkState.FAILED: frozenset(),
    SinkState.CLOSED: frozenset(),
}


class GuardedSink:
    """A sink whose failures go no further than the log."""

    def __init__(self, name: str, sink: MetricSink) -> None:
        self.name = name
        self.state = SinkState.OPEN
        self._sink = sink

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the values of a step, unless it has failed before."""
        if self.state is SinkState.OPEN:
            self._guarded(f"metrics of step {step}", lambda: self._sink.write(step, values))

    def close(self) -> None:
        """Let it send what it still has."""
        if self.state is SinkState.OPEN:
            self._guarded("closing", self._sink.close)
        if self.state is SinkState.OPEN:
            self._enter(SinkState.CLOSED)

    def _guarded(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as exc:  # noqa: BLE001  # others' libraries and networks: anything
            LOGGER.warning(
                "trainer.metric_sinks: %s failed (%s: %s: %s) and gets nothing more of this run; "
                "metrics.jsonl has all of it",
                self.name,
                what,
                type(exc).__name__,
                exc,
            )
            self._enter(SinkState.FAILED)

    def _enter(self, state: SinkState) -> None:
        assert state in SINK_TRANSITIONS[self.state]
        self.state = state


class MetricSinks:
    """All sinks of a run; closed at the end of the block."""

    def __init__(
        self, sinks: Sequence[GuardedSink] = (), *, close_timeout_s: float = CLOSE_TIMEOUT_S
    ) -> None:
        self._sinks = sinks
        self._close_timeout_s = close_timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # In a thread: an upload over a network that is down must not hold up a stop.
        closing = threading.Thread(target=self._close, name="metric-sinks", daemon=True)
        closing.start()
        closing.join(self._close_timeout_s)
        if closing.is_alive():
            LOGGER.warning(
                "trainer.metric_sinks: not closed within %g s; what was not sent by then is lost, "
                "metrics.jsonl has all of it",
                self._close_timeout_s,
            )

    def _close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, record: MetricsRecord) -> None:
        """One line of ``metrics.jsonl``, without what was not measured."""
        values = {
            name: float(value)
            for name, value in record.items()
            if name not in NOT_VALUES and value is not None and isfinite(value)
        }
        for sink in self._sinks:
            sink.write(int(record["step"] or 0), values)


def open_sinks(config: RunConfig, *, completed_steps: int, is_resumed: bool = False) -> MetricSinks:
    """What ``trainer.metric_sinks`` asks for.

    Args:
        completed_steps: where a resumed run goes on.
        is_resumed: an earlier process may have written steps, with a checkpoint or without.

    Raises:
        ConfigurationError: one does not start: no login, no connection, no room.
    """
    makers: dict[MetricSinkKind, Callable[[], Any]] = {
        MetricSinkKind.TENSORBOARD: lambda: TensorBoardSink(
            config.run_dir / TENSORBOARD_DIRECTORY,
            completed_steps=completed_steps,
            is_resumed=is_resumed,
        ),
        MetricSinkKind.WANDB: lambda: WandbSink(config),
        MetricSinkKind.TRACKIO: lambda: TrackioSink(config),
    }
    sinks: list[GuardedSink] = []
    for kind in config.trainer.metric_sinks:
        try:
            sinks.append(GuardedSink(kind.value, makers[kind]()))
        except Exception as exc:  # whatever the library raises, the reader needs setting and reason
            for sink in sinks:
                sink.close()
            raise ConfigurationError(
                f"trainer.metric_sinks: {PACKAGES[kind]} does not start: "
                f"{type(exc).__name__}: {exc}",
                param="trainer.metric_sinks",
            ) from exc
    return MetricSinks(sinks)
