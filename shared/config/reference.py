"""``python -m shared.config.reference`` writes ``docs/configuration.md``: every setting."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from shared.api_keys import KEYS_VARIABLE
from shared.config.settings_list import TOP_LEVEL, Section, Setting, sections
from shared.credentials import CA_FILE_VARIABLE, KEY_FILE_VARIABLE, KEY_VARIABLE

PAGE = Path("docs/configuration.md")

VARIABLES = {
    "SLIPSTREAM_URL": "server that the commands talk to (`--url`)",
    KEY_VARIABLE: "API key that the commands and the trainer send",
    KEY_FILE_VARIABLE: "the same, in a file that only its owner can read",
    CA_FILE_VARIABLE: "PEM certificates that the server's is checked against",
    KEYS_VARIABLE: "keys that the server accepts, beside `server.api_keys_file`",
    "SLIPSTREAM_TORCH_INDEX_URL": "package index with the CPU build of torch, for `make setup`",
    "SLIPSTREAM_VLLM_PLUGIN": "`0` leaves vLLM as it is, for benchmarks of plain vLLM",
}
"""Variables with our prefix that are not settings."""

HEAD = """\
# Configuration

Written by `python -m shared.config.reference` from the models in `shared/config/`; `make docs` does
it too.

One YAML file holds everything, and every command that starts something takes it as `--config FILE`.
Presets are in `deploy/configs/`. Later sources win:

1. the file,
2. the environment: `SLIPSTREAM_` and the key in capitals, two underscores for each dot
   (`SLIPSTREAM_ENGINE__COUNT=2`),
3. the command line: `--set engine.count=2`, as often as needed. Values are read as YAML.

`slipstream config show -c FILE` prints the result with every default. An unknown key, a wrong type,
a value beyond its limits or settings that contradict each other end the command with exit code 2
before anything starts; the message names key, value and limit.

Only `model.path` is required. A name ends in its unit: `_s` is seconds, `_bytes` and `_mib` are
sizes.

## Variables that are not settings

| Variable | Is |
|---|---|
"""


def page() -> str:
    """The whole page."""
    variables = "".join(f"| `{name}` | {text} |\n" for name, text in VARIABLES.items())
    return HEAD + variables + "".join(_section(section) for section in sections())


def _section(section: Section) -> str:
    heading = "Top level" if section.title == TOP_LEVEL else section.title
    lines = [f"\n## {heading}\n", f"{section.meaning}\n"] if section.key else [f"\n## {heading}\n"]
    if section.settings:
        lines += ["| Setting | Type | Default | Limits | |", "|---|---|---|---|---|"]
        lines += map(_row, section.settings)
        lines += _value_lists(section)
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    cells = (f"`{setting.key}`", setting.type, setting.default, setting.limits, setting.meaning)
    # A bar would end the cell, in a code span too.
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _value_lists(section: Section) -> Iterator[str]:
    for setting in section.settings:
        if any(setting.values.values()):
            yield f"\n`{setting.key}`:\n"
            yield from (f"- `{value}`: {text}" for value, text in setting.values.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} written", file=sys.stderr)
