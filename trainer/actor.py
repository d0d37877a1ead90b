"""The trainer as an actor: a plain class, placed by launch.py.

``run`` occupies one thread to the end; ``status`` and ``stop`` answer from others meanwhile.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from shared.config.run import RunConfig
from shared.credentials import ClientCredentials
from shared.logging import configure_logging
from trainer.status import StatusBoard, TrainerPhase, TrainerStatus

if TYPE_CHECKING:
    from trainer.loop import TrainingLoop

LOGGER = logging.getLogger(__name__)


class TrainerActor:
    """Runs one training job."""

    def __init__(
        self, config: RunConfig, *, resume: bool, credentials: ClientCredentials | None = None
    ) -> None:
        configure_logging(config.logging.level, "trainer", log_format=config.logging.format)
        self._config = config
        self._credentials = credentials
        self._resume = resume
        self._board = StatusBoard(config.trainer.num_steps)
        self._stop = threading.Event()
        self._loop: TrainingLoop | None = None

    def run(self) -> TrainerPhase:
        """Train to the end. Returns FINISHED or STOPPED.

        Raises:
            ConfigurationError: the configuration cannot be trained with.
            SlipstreamError: training failed; the last checkpoint can be resumed.
        """
        try:
            outcome = self._train()
        except BaseException:
            self._board.enter(TrainerPhase.FAILED)
            raise
        self._board.enter(outcome)
        return outcome

    def status(self) -> TrainerStatus:
        """What it does now."""
        return self._board.read()

    def stop(self) -> None:
        """Ask it to end at the next safe point; running rollouts are aborted. Idempotent."""
        self._stop.set()
        loop = self._loop
        if loop is not None:
            loop.abort_rollouts()

    def _train(self) -> TrainerPhase:
        # Imported here: torch and transformers take seconds, in which stop() must be answered.
        from trainer.setup import build_trainer

        trainer = build_trainer(
            self._config,
            self._credentials,
            resume=self._resume,
            board=self._board,
            stop=self._stop,
        )
        with trainer.client, trainer.sinks, trainer.speculation:
            self._loop = trainer.loop
            try:
                return trainer.loop.run()
            finally:
                self._loop = None
