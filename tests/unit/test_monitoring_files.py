"""deploy/monitoring names only metrics that a server exports, in expressions that parse."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config.server import ServerConfig
from tests.support.scrape import sample_names, scraped, vllm_sample_names

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
METRIC = re.compile(r"(?<![\w$\"])((?:slipstream_|vllm:|process_)\w+|up(?=\{))")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
PAIRS = {")": "(", "]": "[", "}": "{"}
OF_PROMETHEUS = {"up"}
PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")
"""Of Debian's package ``prometheus``; not part of the set-up."""


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    return loaded


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """By where they stand."""
    found = {rule["alert"]: rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"{panel['title']}/{target['refId']}"] = target["expr"]
    for annotation in dashboard()["annotations"]["list"]:
        found[annotation["name"]] = annotation["expr"]
    return found


def named(expression: str) -> set[str]:
    """Metrics in it."""
    return set(METRIC.findall(STRING.sub('""', expression)))


def watched_of_vllm() -> set[str]:
    """vLLM's metrics that the files name."""
    found = set().union(*(named(expression) for expression in expressions().values()))
    return {name for name in found if name.startswith("vllm:")}


def unbalanced(expression: str) -> bool:
    opened: list[str] = []
    for character in STRING.sub('""', expression):
        if character in PAIRS.values():
            opened.append(character)
        elif character in PAIRS and (not opened or opened.pop() != PAIRS[character]):
            return True
    return bool(opened) or STRING.sub("", expression).count('"') > 0


async def test_every_metric_that_is_watched_is_exported() -> None:
    exported = sample_names(await scraped()) | OF_PROMETHEUS
    of_vllm = vllm_sample_names()
    for place, expression in expressions().items():
        found = named(expression)
        assert found, f"{place} names no metric: {expression}"
        for name in found:
            if name.startswith("vllm:"):
                assert of_vllm is None or name in of_vllm, f"{place}: vLLM has no {name}"
            else:
                assert name in exported, f"{place}: {name} is not exported"


async def test_labels_that_are_selected_or_shown_are_those_of_the_metric() -> None:
    text = await scraped()
    selector = re.compile(r"(slipstream_\w+)\{([^}]*)\}")
    for place, expression in expressions().items():
        for name, matchers in selector.findall(expression):
            wanted = set(re.findall(r"(\w+)\s*[=!]~?", matchers)) - {"job", "instance"}
            lines = re.findall(rf"^{name}(?:\{{(.*)\}})? ", text, re.MULTILINE)
            labels = set(re.findall(r'(\w+)="', lines[0]))
            assert wanted <= labels, f"{place}: {name} has the labels {sorted(labels)}"


@pytest.mark.parametrize("place", sorted(expressions()))
def test_the_brackets_of_an_expression_match(place: str) -> None:
    assert not unbalanced(expressions()[place])


def test_brackets_that_do_not_match_are_noticed() -> None:
    for broken in ("sum(a", "a]", "rate(a[5m)]", 'a{b="c}'):
        assert unbalanced(broken)
    assert not unbalanced('sum by (a) (rate(b{c="]", d=~"x.*"}[5m])) / 2')


def test_every_alert_says_how_bad_it_is_and_what_about() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)


def test_panels_neither_overlap_nor_leave_the_grid() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_a_scrape_outlasts_the_longest_wait_for_engines() -> None:
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["global"]
    assert float(scrape["scrape_timeout"].rstrip("s")) > ServerConfig().engine_metrics_timeout_s


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here (PROMTOOL names one)")
def test_promtool_finds_nothing_and_every_alert_fires_when_it_should(tmp_path: Path) -> None:
    promtool = str(PROMTOOL)
    on_dashboard = [
        {"record": f"r{number}", "expr": re.sub(r"\$__rate_interval", "5m", expression)}
        for number, expression in enumerate(expressions().values())
    ]
    rule_file = tmp_path / "dashboard.yml"
    rule_file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": on_dashboard}]}))
    for arguments in (
        ["check", "config", str(FOLDER / "prometheus.yml")],
        ["check", "rules", str(rule_file)],
        ["test", "rules", str(FOLDER / "alerts.test.yml")],
    ):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here (PROMTOOL names one)")
def test_promtool_has_nothing_against_the_names_and_units() -> None:
    """Of our own metrics: what vLLM and prometheus_client call theirs is theirs."""
    own = "".join(
        line + "\n"
        for line in asyncio.run(scraped()).splitlines()
        if re.match(r"(# (HELP|TYPE) )?slipstream_", line)
    )
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=own, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
