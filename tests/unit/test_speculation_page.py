"""docs/speculation.md names every setting with its default, every metric and every reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.harness.published_costs import MODEL_7B, published_cost_model
from rollout_server.speculation.policy import initial_policy
from rollout_server.speculation_metrics import speculation_metrics
from shared.config.speculation import SpeculationConfig
from shared.metrics import PREFIX
from shared.schemas.speculation import SpeculationPatch
from shared.types import SpeculationReason
from tests.fakes.engine import FakeEngine

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "speculation.md").read_text(encoding="utf-8")
SETTINGS_ROW = re.compile(r"^\| `(\w+)` \| `?([\w.]+)`? \| (\*live\*)?", re.MULTILINE)


def rows_of(section: str) -> str:
    return PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", sorted(SpeculationConfig.model_fields))
def test_the_page_has_the_setting_with_its_default_and_whether_it_is_live(name: str) -> None:
    rows = {row[0]: row[1:] for row in SETTINGS_ROW.findall(rows_of("Settings"))}
    default, live = rows[name]
    expected = getattr(SpeculationConfig(), name)
    texts = {None: "none", False: "false"}
    assert default == str(texts.get(expected, expected) if expected in texts else expected)
    assert bool(live) == (name in SpeculationPatch.model_fields)


async def test_the_page_has_exactly_the_metrics_of_an_engines_speculation() -> None:
    policy = initial_policy(SpeculationConfig())
    report = await FakeEngine("a").speculation(0)
    exposed = {
        # prometheus_client keeps a counter's name without its suffix.
        (family.name + ("_total" if family.type == "counter" else "")).removeprefix(PREFIX)
        for family in speculation_metrics([report], lambda engine_id: policy)
    }
    named = set(re.findall(r"^\| `(engine_\w+)", rows_of("Metrics"), re.MULTILINE))
    assert named == exposed


def test_the_page_has_every_reason() -> None:
    named = re.findall(r"^\| `(\w+)` \|", rows_of("Reasons"), re.MULTILINE)
    assert set(named) == {reason.value for reason in SpeculationReason}


def test_the_example_of_equal_occupancy_is_what_the_published_figures_give() -> None:
    model, _ = published_cost_model(MODEL_7B)
    text = PAGE
    for num_reqs, context, verb in ((8, 8192, "give"), (128, 512, "and")):
        plain_s, drafting_s = (model.steady_step_s(num_reqs, num_reqs * context, k) for k in (0, 5))
        assert f"{verb} {5.5 * plain_s / drafting_s:.2f} times" in text
