"""The figures that end a run: ``summary.json`` and the table on the terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean, median

from trainer.report.jsonl import number
from trainer.report.run_data import RunData
from trainer.report.speculation_stats import speculation_share

NUM_EDGE_STEPS = 3
"""Steps averaged for the first and the last reward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """None stands for what the run did not record."""

    name: str
    num_steps: int
    total_s: float | None
    first_reward: float | None
    last_reward: float | None
    first_accuracy: float | None
    last_accuracy: float | None
    mean_tokens_per_s: float | None
    mean_acceptance_length: float | None
    acceptance_rate: float | None
    speculation_on_fraction: float | None
    num_speculation_switches: int
    num_pushes: int
    median_push_s: float | None
    median_paused_s: float | None
    rollout_time_fraction: float | None
    """Of the trainer's time: how long it waited for rollouts."""
    hidden_sampling_fraction: float | None
    """Of the time in which batches were sampled: how long the trainer did something else."""
    mean_policy_lag: float | None
    max_policy_lag: int | None
    weight_version: int | None
    max_mismatch_kl: float | None
    max_logprob_diff: float | None

    def to_json(self) -> dict[str, object]:
        """For ``summary.json``."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line of the table."""
        return [
            ("training steps", f"{self.num_steps} in {duration(self.total_s)}"),
            ("reward, first and last steps", change(self.first_reward, self.last_reward, ".3f")),
            ("held-out accuracy", change(self.first_accuracy, self.last_accuracy, ".1%")),
            ("rollout throughput", shown(self.mean_tokens_per_s, ",.0f", " tokens/s")),
            ("share of time waiting for rollouts", shown(self.rollout_time_fraction, ".0%")),
            ("sampling hidden behind training", shown(self.hidden_sampling_fraction, ".0%")),
            ("policy lag in updates", spread(self.mean_policy_lag, self.max_policy_lag)),
            ("engine steps with speculation", shown(self.speculation_on_fraction, ".0%")),
            ("switches on or off", str(self.num_speculation_switches)),
            ("mean acceptance length", shown(self.mean_acceptance_length, ".2f")),
            ("draft tokens accepted", shown(self.acceptance_rate, ".1%")),
            ("weight pushes", f"{self.num_pushes}, now at version {self.weight_version or 0}"),
            ("push, median", shown(self.median_push_s, ".3f", " s")),
            ("generation paused per push, median", shown(self.median_paused_s, ".3f", " s")),
            ("largest policy mismatch (KL)", shown(self.max_mismatch_kl, ".2e")),
            ("largest logprob difference", shown(self.max_logprob_diff, ".2e")),
        ]


def summarize(run: RunData) -> RunSummary:
    """Boil a run down to its figures."""
    reward, accuracy = run.values("reward/mean"), run.values("eval/accuracy")
    rates = run.values("rollout/tokens_per_s")
    lengths = [value for value in run.values("rollout/mean_acceptance_length") if value > 0]
    drafted = sum(run.values("rollout/num_draft_tokens"))
    accepted = sum(run.values("rollout/num_accepted_tokens"))
    share = speculation_share(run.decisions)
    pushes = run.values("weights/push_s")
    phases = {
        name: sum(run.values(f"phase/{name}_s"))
        for name in ("rollout", "logprob", "train", "publish", "eval")
    }
    phase_total_s = sum(phases.values())
    times = [event.time_s for event in run.events]
    versions = run.values("weights/version")
    lags = run.values("lag/max")
    return RunSummary(
        name=run.run_dir.name,
        # Step 0 is the evaluation before training.
        num_steps=sum((number(record, "step") or 0) > 0 for record in run.metrics),
        total_s=max(times) - min(times) if len(times) > 1 else phase_total_s or None,
        first_reward=mean(reward[:NUM_EDGE_STEPS]),
        last_reward=mean(reward[-NUM_EDGE_STEPS:]),
        first_accuracy=accuracy[0] if accuracy else None,
        last_accuracy=accuracy[-1] if accuracy else None,
        mean_tokens_per_s=mean(rates),
        mean_acceptance_length=mean(lengths),
        acceptance_rate=accepted / drafted if drafted else None,
        speculation_on_fraction=share.fraction_on,
        num_speculation_switches=share.num_switches,
        num_pushes=len(pushes),
        median_push_s=median(pushes) if pushes else None,
        median_paused_s=middle(run.values("weights/paused_s")),
        rollout_time_fraction=phases["rollout"] / phase_total_s if phase_total_s else None,
        hidden_sampling_fraction=hidden_fraction(run),
        mean_policy_lag=mean(run.values("lag/mean")),
        max_policy_lag=int(max(lags)) if lags else None,
        weight_version=int(versions[-1]) if versions else None,
        max_mismatch_kl=max(run.values("policy/mismatch_kl"), default=None),
        max_logprob_diff=max(run.values("policy/max_logprob_diff"), default=None),
    )


def hidden_fraction(run: RunData) -> float | None:
    """Over all batches, each by how long it was sampled."""
    sample_s = dict(zip(*run.column("rollout/sample_s"), strict=True))
    hidden = dict(zip(*run.column("rollout/hidden_fraction"), strict=True))
    total_s = sum(sample_s[step] for step in hidden if step in sample_s)
    hidden_s = sum(sample_s[step] * hidden[step] for step in hidden if step in sample_s)
    return hidden_s / total_s if total_s > 0 else None


def mean(values: list[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return fmean(values) if values else None


def middle(values: list[float]) -> float | None:
    """Median; None of nothing."""
    return median(values) if values else None


def shown(value: float | None, pattern: str, unit: str = "") -> str:
    """A formatted value with its unit; a dash for nothing."""
    return "-" if value is None else f"{value:{pattern}}{unit}"


def spread(average: float | None, largest: float | None) -> str:
    """``0.97, at most 1``."""
    return "-" if largest is None else f"{shown(average, '.2f')}, at most {largest}"


def change(first: float | None, last: float | None, pattern: str) -> str:
    """``0.123 → 0.456``."""
    return f"{shown(first, pattern)} → {shown(last, pattern)}"


def duration(seconds: float | None) -> str:
    """``1 h 02 min``, ``3 min 05 s`` or ``12.3 s``."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
