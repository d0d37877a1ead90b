"""docs/rewards.md has every built-in reward with its parameters, and a true example."""

from __future__ import annotations

import inspect
import json
import re
import runpy
from pathlib import Path

import pytest

from rollout_server.scoring.registry import BUILTIN_REWARDS
from rollout_server.scoring.signature import read_signature

PAGE = (Path(__file__).resolve().parents[2] / "docs/rewards.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
ROW = re.compile(r"^\| `(\w+)` \| (required|`[^`]+`) \| .+\.? \|$", re.MULTILINE)


def test_every_reward_has_a_section_and_a_line_in_the_first_table() -> None:
    assert SECTIONS.keys() == BUILTIN_REWARDS.keys()
    assert set(re.findall(r"^\| \[`(\w+)`\]\(#\w+\)", PAGE, re.MULTILINE)) == SECTIONS.keys()


@pytest.mark.parametrize("name", sorted(BUILTIN_REWARDS))
def test_the_parameters_are_those_of_the_code(name: str) -> None:
    function = BUILTIN_REWARDS[name].function
    parameters = inspect.signature(function).parameters
    expected = []
    for param in read_signature(function).params:
        default = parameters[param].default
        is_required = default is inspect.Parameter.empty
        expected.append((param, "required" if is_required else f"`{json.dumps(default)}`"))
    assert ROW.findall(SECTIONS[name]) == expected


def test_the_example_of_two_rewards_together_is_true(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "example.py"
    path.write_text(code)
    reward = runpy.run_path(str(path))["short_and_right"]
    assert reward("", "= 5", "5", {}) == (1.0, {"found": "5", "expected": "5"})
    assert reward("", "a" * 3600 + "= 5", "5", {})[0] == pytest.approx(1.0 - 403 / 800)
