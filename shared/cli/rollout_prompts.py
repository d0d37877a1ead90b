"""The prompts of ``slipstream rollout``: read and checked before the first one is sent."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from shared.errors import ConfigurationError
from shared.schemas.rollouts import PromptItem, RewardSpec, SamplingOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedPrompt:
    """A prompt with the id its result carries in the output file."""

    prompt_id: str
    line_number: int
    item: PromptItem


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSettings:
    """What is the same for every prompt of the file."""

    n: int
    sampling: SamplingOptions
    reward: RewardSpec | None


def read_prompts(path: Path, settings: RolloutSettings) -> list[NumberedPrompt]:
    """Parse and check the whole file.

    Raises:
        ConfigurationError: naming the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"cannot read prompts from {path}: {exc}") from exc
    return [
        _numbered(path, number, line, settings)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def prompt_id_of(number: int, item: PromptItem, settings: RolloutSettings) -> str:
    """Line number and a digest of prompt and settings: other settings are other results."""
    parts = [
        item.model_dump_json(),
        str(settings.n),
        settings.sampling.model_dump_json(),
        settings.reward.model_dump_json() if settings.reward else "",
    ]
    return f"{number}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"


def _numbered(path: Path, number: int, line: str, settings: RolloutSettings) -> NumberedPrompt:
    try:
        data = json.loads(line)
        fields = {"prompt": data} if isinstance(data, str) else data
        item = PromptItem.model_validate(fields)
    except json.JSONDecodeError as exc:
        raise ConfigurationError(f"{path} line {number} is not JSON: {exc}") from exc
    except ValidationError as exc:
        problem = exc.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "prompt"
        raise ConfigurationError(f"{path} line {number}: {key}: {problem['msg']}") from exc
    prompt_id = prompt_id_of(number, item, settings)
    return NumberedPrompt(prompt_id=prompt_id, line_number=number, item=item)
