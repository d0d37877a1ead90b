"""docs/operations.md names every metric, alert and setting there is, and none that is not."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shared.config.observability import TracingConfig
from shared.logging import log_context
from shared.metrics import PREFIX
from tests.support.scrape import scraped

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "operations.md").read_text(encoding="utf-8")
SPECULATION_PAGE = (DOCS / "speculation.md").read_text(encoding="utf-8")
METRIC_ROW = re.compile(r"^\| `(\w+)(?:\{([\w,]+)\})?` \|", re.MULTILINE)
OF_A_BUCKET = {"le"}


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


async def exported() -> dict[str, set[str]]:
    """Labels by name, as the page gives them."""
    found = {}
    for family in text_string_to_metric_families(await scraped()):
        if family.name.startswith(PREFIX):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = set().union(*(sample.labels for sample in family.samples)) - OF_A_BUCKET
            found[name.removeprefix(PREFIX)] = labels
    return found


async def test_the_pages_have_exactly_the_metrics_of_the_server_with_their_labels() -> None:
    here = dict(METRIC_ROW.findall(section(PAGE, "Metrics")))
    there = dict(METRIC_ROW.findall(section(SPECULATION_PAGE, "Metrics")))
    assert not here.keys() & there.keys(), "explained twice"
    labels = {name: set(text.split(",")) - {""} for name, text in here.items()}
    # The other page says once that all of its metrics have the label engine.
    labels |= {name: {"engine", *text.split(",")} - {""} for name, text in there.items()}
    assert labels == await exported()


def test_the_page_has_every_alert_in_order() -> None:
    groups = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"]]
    assert re.findall(r"^\| `(Slipstream\w+)` \|", section(PAGE, "Alerts"), re.MULTILINE) == alerts


def test_the_page_has_every_field_of_a_log_line() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section(PAGE, "Logs"), re.MULTILINE)
    assert rows == list(inspect.signature(log_context).parameters)


@pytest.mark.parametrize("name", sorted(TracingConfig.model_fields))
def test_the_page_has_the_setting_of_tracing_with_its_default(name: str) -> None:
    rows = dict(re.findall(r"^\| `tracing\.(\w+)` \| `(.+?)` \|", PAGE, re.MULTILINE))
    default = getattr(TracingConfig(), name)
    assert rows[name] == (str(default).lower() if isinstance(default, bool) else str(default))
