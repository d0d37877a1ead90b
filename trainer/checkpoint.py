"""Checkpoints: one directory per saved step, complete or absent, safetensors and JSON only.

::

    checkpoints/step-000010/
        model.safetensors config.json tokenizer...   a model directory like any other, in float32
        optimizer.safetensors                        moments and step counts, by parameter name
        trainer_state.json                           written last
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file

from shared.errors import ConfigurationError, SlipstreamError
from trainer.batch_plan import PendingBatch
from trainer.optimization import Optimization
from trainer.policy import Policy
from trainer.policy_history import PolicyHistory

_STEP_DIRECTORY = re.compile(r"step-(\d{6,})")
_STATE_FILE = "trainer_state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
_TORCH_RNG_KEY = "rng/torch"
_CUDA_RNG_KEY = "rng/cuda"


class TrainerState(BaseModel):
    """What a run needs to go on, besides weights and optimizer moments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Steps completed."""
    weight_version: int
    num_updates: int
    seed: int
    revision: int = 0
    """Steps that changed the policy (``PolicyHistory``)."""
    versions: dict[int, int] = Field(default_factory=dict)
    """Revision by weight version, of the latest ones."""
    pending: tuple[PendingBatch, ...] = ()
    """Batches that had been asked for and not been trained on."""

    @property
    def history(self) -> PolicyHistory:
        """Which weights the versions stood for."""
        return PolicyHistory(revision=self.revision, versions=self.versions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainerState


class CheckpointDraft:
    """A checkpoint but for its state: nobody finds it before it is completed."""

    def __init__(self, partial: Path, final: Path, prune: Callable[[], None]) -> None:
        self._partial = partial
        self._final = final
        self._prune = prune

    def complete(self, state: TrainerState) -> Path:
        """Make it the checkpoint of its step, then prune old ones.

        Raises:
            SlipstreamError: the disk does not take it.
        """
        try:
            (self._partial / _STATE_FILE).write_text(state.model_dump_json(indent=2))
            _sync([self._partial / _STATE_FILE, self._partial])
            self._put_in_place()
        except OSError as exc:
            self.discard()
            raise SlipstreamError(f"checkpoint {self._final} cannot be written: {exc}") from exc
        self._prune()
        return self._final

    def _put_in_place(self) -> None:
        replaced = self._partial.with_name(f"{self._partial.name}-replaced")
        if self._final.exists():  # the same step again, after a resume from an earlier one
            # Not removed file by file where it is: whoever ends amid that loses both.
            os.replace(self._final, replaced)
        try:
            os.replace(self._partial, self._final)
        except OSError:
            if replaced.exists():
                os.replace(replaced, self._final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)  # what is left of it, the next prune removes

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)


class CheckpointStore:
    """Saves, finds and prunes the checkpoints of one run."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._keep = keep

    def save(
        self, state: TrainerState, policy: Policy, optimization: Optimization, tokenizer: Any
    ) -> Path:
        """Write a checkpoint that appears only when complete, then prune old ones.

        Raises:
            SlipstreamError: the disk does not take it.
        """
        return self.draft(state.step, policy, optimization, tokenizer).complete(state)

    def draft(
        self, step: int, policy: Policy, optimization: Optimization, tokenizer: Any
    ) -> CheckpointDraft:
        """Write what is large. Only reads, so a push of the same weights may run meanwhile.

        Raises:
            SlipstreamError: the disk does not take it.
        """
        final = self._directory / f"step-{step:06d}"
        partial = self._directory / f".partial-{final.name}-{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            policy.model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            save_file(optimization.state_tensors() | _rng_tensors(), partial / _OPTIMIZER_FILE)
            _sync(partial.iterdir())
        except OSError as exc:
            shutil.rmtree(partial, ignore_errors=True)
            raise SlipstreamError(f"checkpoint {final} cannot be written: {exc}") from exc
        return CheckpointDraft(partial, final, self._prune)

    def latest(self) -> Checkpoint | None:
        """The checkpoint of the highest step, or None.

        Raises:
            ConfigurationError: its state file is not readable as one of ours.
        """
        steps = self._steps()
        if not steps:
            return None
        path = steps[max(steps)]
        try:
            state = TrainerState.model_validate_json((path / _STATE_FILE).read_text())
        except (OSError, ValidationError) as exc:
            raise ConfigurationError(
                f"checkpoint {path} has no usable {_STATE_FILE}: {exc}; remove the directory to "
                "resume from the one before"
            ) from exc
        return Checkpoint(path=path, state=state)

    def _steps(self) -> dict[int, Path]:
        if not self._directory.is_dir():
            return {}
        found = {}
        for path in self._directory.iterdir():
            match = _STEP_DIRECTORY.fullmatch(path.name)
            if match is not None and path.is_dir():
                found[int(match[1])] = path
        return found

    def _prune(self) -> None:
        steps = self._steps()
        for step in sorted(steps)[: -self._keep]:
            shutil.rmtree(steps[step])
        for leftover in self._directory.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def restore(checkpoint: Checkpoint, optimization: Optimization) -> None:
    """Load optimizer state and random-number state. The policy is loaded from the same path.

    Raises:
        SlipstreamError: the state is of another model.
    """
    tensors = load_file(checkpoint.path / _OPTIMIZER_FILE)
    torch.set_rng_state(tensors.pop(_TORCH_RNG_KEY))
    cuda_state = tensors.pop(_CUDA_RNG_KEY, None)
    if cuda_state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_state)
    optimization.load_state_tensors(tensors, checkpoint.state.num_updates)


def _rng_tensors() -> dict[str, torch.Tensor]:
    tensors = {_TORCH_RNG_KEY: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[_CUDA_RNG_KEY] = torch.cuda.get_rng_state()
    return tensors


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
