"""docs/tutorial.md: its files fit together, and its calls work against a server."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from rollout_server.scoring.registry import import_reward
from shared.config.loading import validate_run_config
from shared.config.run import RunConfig
from shared.config.trainer import JsonlTaskConfig
from tests.fakes.docs_server import docs_server
from tests.support.doc_pages import run_python, run_shell, sections
from trainer.tasks.jsonl import JsonlTask

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
SECTIONS = {section.title: section for section in sections(PAGE)}
SAMPLE, OWN = "4. Sample", "7. Your own prompts and reward"


def block(title: str, language: str) -> str:
    (code,) = [code for found, code in SECTIONS[title].blocks if found == language]
    return code


def shell_line(title: str, start: str) -> str:
    """The command under a heading that begins so."""
    (line,) = re.findall(rf"^    ({start}.*)$", SECTIONS[title].text, re.MULTILINE)
    return str(line)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody follows the tutorial: ``slipstream`` is on the path."""
    program = tmp_path / "bin" / "slipstream"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m shared.cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_shell(shell_line(SAMPLE, "printf "), "", tmp_path)
    return tmp_path


def test_its_prompts_are_sampled_and_scored_as_it_says(place: Path) -> None:
    with docs_server() as url:
        for _ in range(2):  # typed again, it finds everything there
            run_shell(shell_line(SAMPLE, "slipstream rollout "), url, place)
        assert run_python(block(SAMPLE, "python"), url).startswith("[")
    lines = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    assert sorted(line["answer"] for line in lines) == ["13", "5", "7"]
    assert all(len(line["samples"]) == 4 for line in lines)
    assert all(sample["reward"] is not None for line in lines for sample in line["samples"])


def own_configuration() -> RunConfig:
    return validate_run_config(yaml.safe_load(block(OWN, "yaml")))


def test_its_configuration_loads_and_finds_problems_for_both_sides_in_its_prompts(
    place: Path,
) -> None:
    task = own_configuration().trainer.task
    assert isinstance(task, JsonlTaskConfig)
    problems = JsonlTask(task.model_copy(update={"train_path": str(place / task.train_path)}))
    assert problems.held_out(10)
    assert len(problems.train_batch(0, 2)) == 2


def test_its_reward_is_found_by_its_name_and_likes_what_it_says(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "my_rewards.py").write_text(block(OWN, "python"))
    monkeypatch.syspath_prepend(str(place))
    config = own_configuration()
    reward = import_reward(config.scoring.rewards[config.trainer.reward.name])
    assert reward("2+3=", "5", "5", {}) > reward("2+3=", "it is 5", "5", {}) > 0
    assert reward("2+3=", "6", "5", {}) == 0
