"""Every command that a page shows exists, with its options, settings, targets and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.doc_commands import PAGES, check_command, named_commands, whole_commands

WHOLE = [(page, line) for page in PAGES for line in whole_commands(page.read_text())]
NAMED = [(page, line) for page in PAGES for line in named_commands(page.read_text())]


@pytest.mark.parametrize(("page", "line"), WHOLE, ids=lambda value: getattr(value, "name", value))
def test_a_command_of_a_page_could_be_typed(page: Path, line: str) -> None:
    check_command(line, is_whole=True)


@pytest.mark.parametrize(("page", "line"), NAMED, ids=lambda value: getattr(value, "name", value))
def test_a_command_that_a_page_names_exists(page: Path, line: str) -> None:
    check_command(line, is_whole=False)


def test_the_commands_are_found() -> None:
    tutorial = [line for page, line in WHOLE if page.name == "tutorial.md"]
    assert len(tutorial) >= 20
    assert "slipstream completion bash" in tutorial
    assert {page.name for page, _ in NAMED} >= {"README.md", "AGENTS.md", "operations.md"}


@pytest.mark.parametrize(
    "line",
    [
        "slipstream engine list",
        "slipstream engines list --fast",
        "slipstream engines scale",
        "slipstream engines scale many",
        "slipstream rollout prompts.jsonl",
        "slipstream speculation set --mode sometimes",
        "slipstream serve -c deploy/configs/absent.yaml",
        "slipstream serve -c deploy/configs/demo.yaml --set engine.cont=2",
        "slipstream serve -c deploy/configs/demo.yaml --set engine.count=-1",
        "slipstream serve --set engine.cont=2",
        "SLIPSTREAM_URL=http://x slipstream weights audits   # and so on",
        "make sense",
        "make bench-absent",
        "make run ARGZ=1",
        'make run ARGS="--set trainer.steps=2"',
        "python -m shared.absent",
    ],
)
def test_a_command_that_does_not_exist_is_found_out(line: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  # whichever of its parts says no
        check_command(line, is_whole=True)


@pytest.mark.parametrize("line", ["slipstream engine", "slipstream engines list --fast"])
def test_a_name_of_no_command_is_found_out(line: str) -> None:
    with pytest.raises(ValueError, match="no "):
        check_command(line, is_whole=False)


def test_blocks_of_both_kinds_are_read_and_other_languages_are_not() -> None:
    text = "a\n\n    make x  # y\n\n```bash\nmake z\n```\n\n```python\nmake = 1\nmake w\n```\n"
    assert sorted(whole_commands(text)) == ["make x  # y", "make z"]
