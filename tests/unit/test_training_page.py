"""docs/training.md names every metric of a step, and none that is not."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from shared.types import MetricSinkKind
from tests.fakes.rollouts import rollout_group, rollout_sample
from trainer.batch_plan import BatchTiming
from trainer.collection import SampledBatch
from trainer.evaluation import evaluate_groups, evaluation_metrics
from trainer.policy_history import PolicyHistory
from trainer.publish import PushReport
from trainer.samples import select
from trainer.step_metrics import StepFacts, step_metrics
from trainer.update import UpdateReport

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def filled(kind: Any) -> Any:
    """A report of numbers, one for every field."""
    return kind(**{field.name: 1 for field in fields(kind)})


def written() -> set[str]:
    groups = [rollout_group(samples=[rollout_sample(0, reward=1.0), rollout_sample(1, reward=0)])]
    timing = BatchTiming(asked_s=0.0, arrived_s=1.0, wanted_s=0.0, taken_s=1.0)
    record = step_metrics(
        StepFacts(
            step=1,
            time_s=1.0,
            duration_s=1.0,
            batch=SampledBatch(groups=groups, timing=timing, num_groups_again=0),
            selection=select(groups),
            history=PolicyHistory().served(0),
            update=filled(UpdateReport),
            push=filled(PushReport),
            weight_version=1,
            draft_counts_before={},
            draft_counts_after={},
        )
    )
    names = {*record, *evaluation_metrics(evaluate_groups(groups), 1.0)}
    return {re.sub(r"^(lag/num_samples_)\d+$", r"\1N", name) for name in names}


def test_the_page_has_exactly_the_metrics_of_a_step() -> None:
    section = PAGE.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(named) == len(set(named)), "explained twice"
    assert set(named) == written()


def test_the_page_has_every_sink() -> None:
    section = PAGE.partition("\n## TensorBoard, ")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(MetricSinkKind)
