"""docs/configuration.md and docs/cli.md are what the code says, and the code says enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import Field
from typer.testing import CliRunner

from shared.cli import reference as cli_reference
from shared.cli.main import app
from shared.config import reference as config_reference
from shared.config.base import SettingsModel
from shared.config.loading import RESERVED_ENVIRONMENT, load_run_config
from shared.config.settings_list import EACH, sections, setting_keys

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {item.key: item for section in sections() for item in section.settings}
COMMANDS = dict(cli_reference.commands())


@pytest.mark.parametrize("module", [config_reference, cli_reference], ids=lambda m: m.__name__)
def test_the_page_is_what_the_code_says(module: object) -> None:
    text = (ROOT / module.PAGE).read_text(encoding="utf-8")  # type: ignore[attr-defined]
    assert text == module.page(), "run: make docs"  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_a_setting_says_what_it_means_and_its_values_do(key: str) -> None:
    setting = SETTINGS[key]
    assert setting.meaning.endswith((".", "..."))
    if any(setting.values.values()):  # of some, such as allow and deny, the name says enough
        assert all(setting.values.values()), setting.values


@pytest.mark.parametrize("key", sorted(key for key in SETTINGS if EACH not in key))
def test_the_default_that_is_shown_is_the_one_in_force(key: str) -> None:
    if SETTINGS[key].default == "required":
        assert key == "model.path" or key.endswith("train_path")
        return
    overrides = ["model.path=m", "demo_model={}"]
    if key.startswith("trainer.task.") and key not in ARITHMETIC:
        overrides += ["trainer.task={kind: jsonl, train_path: f}"]
    value: object = load_run_config(None, overrides, environment={})
    for name in key.split("."):
        value = getattr(value, name)
    expected = yaml.safe_load(SETTINGS[key].default.strip("`"))
    shown = list(value) if isinstance(value, tuple) else value
    assert shown == expected or str(shown) == SETTINGS[key].default.strip("`")


ARITHMETIC = {f"trainer.task.{name}" for name in ("num_terms", "max_operand")}


def test_what_is_not_a_setting_is_explained_too() -> None:
    assert set(config_reference.VARIABLES) == RESERVED_ENVIRONMENT


def test_keys_are_those_that_can_be_set() -> None:
    keys = setting_keys()
    assert {"name", "engine.count", "server.limits.max_n", "trainer.task.train_path"} <= set(keys)
    assert "server.limits" not in keys
    assert len(keys) == len(set(keys))


def test_limits_types_and_values_of_a_setting_are_told() -> None:
    count, scheme = SETTINGS["engine.count"], SETTINGS["drafter.scheme"]
    assert (count.type, count.default, count.limits) == ("integer", "`1`", "at least 0")
    assert SETTINGS["engine.gpu_memory_utilization"].limits == "above 0, at most 1"
    assert SETTINGS["model.max_model_len"].type == "integer or null"
    assert SETTINGS["trainer.optimizer.betas"].type == "2 of number"
    assert "`int4`" in scheme.type
    assert scheme.values["int8"].startswith("W8A8")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_and_each_of_its_options_have_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for param in command.params:
        assert param.help, f"{name} {param.name}"
    if passes_arguments_on(command):
        return  # it has no options of its own: what follows goes to a program
    shown = CliRunner().invoke(app, [*name.split()[1:], "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.stdout


def test_commands_that_answer_can_answer_a_program() -> None:
    """Those that serve until they are stopped, or write a file for programs, have no answer."""
    without = {
        name
        for name, command in COMMANDS.items()
        if not has_json(command) and not passes_arguments_on(command)
    }
    assert without == {
        f"slipstream {name}" for name in ("serve", "train", "calibrate", "completion")
    }


def passes_arguments_on(command: cli_reference.Command) -> bool:
    """Benchmarks: they always end with a line of JSON."""
    return command.context_settings.get("ignore_unknown_options", False)


def has_json(command: cli_reference.Command) -> bool:
    return any("--json" in param.opts for param in command.params)


class Entry(SettingsModel):
    """One of several."""

    size: int = Field(default=3, ge=1)
    """How large."""


class Example(SettingsModel):
    entries: list[Entry] = Field(default_factory=list)
    """All of them."""


def test_what_stands_under_a_field_is_its_description() -> None:
    assert Entry.model_fields["size"].description == "How large."


def test_entries_of_a_list_have_a_section_of_their_own() -> None:
    top, entry = sections(Example)
    assert [(item.key, item.type, item.default) for item in top.settings] == [
        ("entries", "list of section", "`[]`")
    ]
    assert (entry.title, entry.meaning) == ("`entries` (each entry)", "One of several.")
    assert [(item.key, item.limits) for item in entry.settings] == [
        ("entries[].size", "at least 1")
    ]
