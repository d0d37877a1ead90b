"""Writes what happens in a run to its directory, one JSON object per line, flushed at once.

``metrics.jsonl``     per step: flat ``component/name`` keys; step 0 is the evaluation before it
``rollouts.jsonl``    per sample
``events.jsonl``      ``<phase>_start`` and ``<phase>_end`` with Unix time and step
``speculation.jsonl`` per recorded decision of an engine's scheduler (see speculation_log.py)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.clock import Clock, SystemClock
from shared.errors import ConfigurationError
from shared.schemas.rollouts import RolloutGroup
from shared.schemas.speculation import SpeculationStep
from trainer.status import MetricsRecord

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
EVENTS_FILE = "events.jsonl"
SPECULATION_FILE = "speculation.jsonl"


class RunRecorder:
    """The four files of one run. Safe to use from several threads."""

    def __init__(self, run_dir: Path, clock: Clock | None = None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()

    def prepare(self, *, resume_after_step: int | None) -> None:
        """Get the files ready: a fresh run must find none; a resumed one drops what it will redo.

        Raises:
            ConfigurationError: a fresh run finds the metrics of another.
        """
        path = self._run_dir / METRICS_FILE
        if resume_after_step is None:
            if path.exists():
                raise ConfigurationError(
                    f"{path} belongs to an earlier run: choose another name, or --resume",
                    param="name",
                )
            return
        for name in (METRICS_FILE, ROLLOUTS_FILE):
            _drop_later_steps(self._run_dir / name, resume_after_step)

    def metrics(self, record: MetricsRecord) -> None:
        """Append one step's line."""
        self._append(METRICS_FILE, [record])

    def rollouts(self, step: int, group: RolloutGroup, prompt_text: str) -> None:
        """Append one line per sample of a group."""
        records = [
            {
                "id": f"{group.group_id}/sample={sample.sample_index}",
                "step": step,
                "prompt": prompt_text,
                "completion": sample.text,
                "answer": group.answer,
                "reward": sample.reward,
                "finish_reason": sample.finish_reason.value,
                "num_completion_tokens": len(sample.token_ids),
                "weight_versions": [span.model_dump() for span in sample.weight_versions],
                "engine_id": sample.engine_id,
                "num_draft_tokens": sample.num_draft_tokens,
                "num_accepted_tokens": sample.num_accepted_tokens,
            }
            for sample in group.samples
        ]
        self._append(ROLLOUTS_FILE, records)

    def decisions(self, engine_id: str, history: Sequence[SpeculationStep]) -> None:
        """Append decisions of one engine."""
        records = [
            {"engine_id": engine_id, **decision.model_dump(mode="json")} for decision in history
        ]
        self._append(SPECULATION_FILE, records)

    def event(self, name: str, step: int) -> None:
        """Append a moment."""
        self._append(EVENTS_FILE, [{"time_s": self._clock.wall_s(), "event": name, "step": step}])

    @contextmanager
    def span(self, phase: str, step: int) -> Iterator[None]:
        """``<phase>_start`` now and ``<phase>_end`` at the end, however it ends."""
        self.event(f"{phase}_start", step)
        try:
            yield
        finally:
            self.event(f"{phase}_end", step)

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if not records:
            return
        # NaN is not JSON: a loss that is not a number must not break every reader of the file.
        text = "".join(
            json.dumps(_without_nan(record), separators=(",", ":")) + "\n" for record in records
        )
        with self._lock, (self._run_dir / name).open("a", encoding="utf-8") as file:
            file.write(text)


def _without_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not abs(value) < float("inf") else value
        for key, value in record.items()
    }


def _drop_later_steps(path: Path, last_step: int) -> None:
    """Keep the lines of steps up to ``last_step``; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last_step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
