"""What a run left behind, as records. Every part may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.config.loading import load_run_config
from shared.config.run import RunConfig
from shared.errors import ConfigurationError
from trainer.report.jsonl import JsonRecord, iterate_jsonl, number, text


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One recorded decision of an engine's speculation scheduler."""

    engine_id: str
    step: int
    """Engine step."""
    time_s: float
    """Unix time."""
    kv_cache_usage: float
    num_speculative_tokens: int
    reason: str
    num_generated_tokens: int | None = None
    """By the engine up to then; None in runs of versions that did not record it."""

    @property
    def is_on(self) -> bool:
        return self.num_speculative_tokens > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A phase of the training loop beginning or ending."""

    time_s: float
    name: str
    step: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    """One rollout as it was trained on."""

    step: int
    prompt: str
    completion: str
    reward: float | None
    finish_reason: str
    weight_versions: str
    num_draft_tokens: int
    num_accepted_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """Everything the report shows."""

    run_dir: Path
    config: RunConfig | None
    config_text: str
    metrics: Sequence[JsonRecord]
    """One record per training step, in order."""
    decisions: Sequence[Decision]
    events: Sequence[Event]
    samples: Sequence[SampleRecord]
    """A few of the first, a middle and the last step."""

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, where it was written."""
        pairs = [
            (step, value)
            for record in self.metrics
            if (step := number(record, "step")) is not None
            and (value := number(record, key)) is not None
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def values(self, key: str) -> list[float]:
        """Values of one metric, where it was written."""
        return self.column(key)[1]


def read_run(run_dir: Path) -> RunData:
    """Read what there is in a run directory."""
    config_path = run_dir / "config.yaml"
    return RunData(
        run_dir=run_dir,
        config=read_config(config_path),
        config_text=config_path.read_text(encoding="utf-8") if config_path.exists() else "",
        metrics=read_metrics(run_dir / "metrics.jsonl"),
        decisions=read_decisions(run_dir / "speculation.jsonl"),
        events=sorted(
            map(parse_event, iterate_jsonl(run_dir / "events.jsonl")), key=lambda e: e.time_s
        ),
        samples=choose_samples(run_dir / "rollouts.jsonl"),
    )


def read_config(path: Path) -> RunConfig | None:
    """The run's resolved configuration; None when it is absent or from another version."""
    try:
        return load_run_config(path, environment={})
    except ConfigurationError:
        return None


def read_metrics(path: Path) -> list[JsonRecord]:
    """One record per step: after a resume the later of two records of a step counts."""
    by_step: dict[float, dict[str, object]] = {}
    for record in iterate_jsonl(path):
        step = number(record, "step")
        if step is not None:
            by_step[step] = {**by_step.get(step, {}), **record}
    return [by_step[step] for step in sorted(by_step)]


def read_decisions(path: Path) -> list[Decision]:
    """Decisions of all engines in order of time."""
    parsed = (parse_decision(record) for record in iterate_jsonl(path))
    return sorted((d for d in parsed if d is not None), key=lambda d: d.time_s)


def parse_decision(record: JsonRecord) -> Decision | None:
    """A line of ``speculation.jsonl``; None when it lacks time or occupancy."""
    time_s, usage = number(record, "time_s"), number(record, "kv_cache_usage")
    if time_s is None or usage is None:
        return None
    tokens = number(record, "num_generated_tokens")
    return Decision(
        engine_id=text(record, "engine_id"),
        step=int(number(record, "step") or 0),
        time_s=time_s,
        kv_cache_usage=usage,
        num_speculative_tokens=int(number(record, "num_speculative_tokens") or 0),
        reason=text(record, "reason"),
        num_generated_tokens=None if tokens is None else int(tokens),
    )


def parse_event(record: JsonRecord) -> Event:
    """A line of ``events.jsonl``."""
    step = number(record, "step")
    return Event(
        time_s=number(record, "time_s") or 0.0,
        name=text(record, "event"),
        step=None if step is None else int(step),
    )


def choose_samples(path: Path, num_per_step: int = 3) -> list[SampleRecord]:
    """The first few samples of the first, the middle and the last step."""
    by_step: dict[int, list[SampleRecord]] = {}
    for record in iterate_jsonl(path):
        step = int(number(record, "step") or 0)
        kept = by_step.setdefault(step, [])
        if len(kept) < num_per_step:
            kept.append(parse_sample(record, step))
    steps = sorted(by_step)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [sample for step in chosen for sample in by_step[step]]


def parse_sample(record: JsonRecord, step: int) -> SampleRecord:
    """A line of ``rollouts.jsonl``."""
    return SampleRecord(
        step=step,
        prompt=text(record, "prompt"),
        completion=text(record, "completion"),
        reward=number(record, "reward"),
        finish_reason=text(record, "finish_reason"),
        weight_versions=format_spans(record.get("weight_versions")),
        num_draft_tokens=int(number(record, "num_draft_tokens") or 0),
        num_accepted_tokens=int(number(record, "num_accepted_tokens") or 0),
    )


def format_spans(spans: object) -> str:
    """``v3 [0, 17), v4 [17, 40)`` for the half-open spans of a sample."""
    if not isinstance(spans, list):
        return ""
    return ", ".join(
        f"v{span.get('version')} [{span.get('start')}, {span.get('end')})"
        if isinstance(span, dict)
        else str(span)
        for span in spans
    )
