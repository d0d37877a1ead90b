"""From YAML file, ``SLIPSTREAM_*`` environment and ``--set a.b=c`` to one validated ``RunConfig``.

Later sources win: file < environment < command line. Environment names join the path with two
underscores: ``SLIPSTREAM_ENGINE__COUNT=2``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from shared.api_keys import KEYS_VARIABLE
from shared.config.run import RunConfig
from shared.credentials import CA_FILE_VARIABLE, KEY_FILE_VARIABLE, KEY_VARIABLE
from shared.errors import ConfigurationError

ENVIRONMENT_PREFIX = "SLIPSTREAM_"
RESERVED_ENVIRONMENT = frozenset(
    {
        "SLIPSTREAM_TORCH_INDEX_URL",
        "SLIPSTREAM_URL",
        "SLIPSTREAM_VLLM_PLUGIN",
        KEYS_VARIABLE,
        KEY_VARIABLE,
        KEY_FILE_VARIABLE,
        CA_FILE_VARIABLE,
    }
)
"""Variables of ours that are not settings: of the installer, the CLI and the vLLM plugin; and
secrets, which a configuration must not hold, because it is printed and written to files."""


def load_run_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> RunConfig:
    """Read, merge and validate.

    Args:
        path: YAML file, or None for the defaults plus overrides.
        overrides: ``a.b=value`` items; values are parsed as YAML.
        environment: defaults to ``os.environ``.

    Raises:
        ConfigurationError: naming the key, the value and the limit.
    """
    data = _read_yaml(path)
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in RESERVED_ENVIRONMENT:
            keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            _assign(data, keys, _parse_value(text, name), origin=name)
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigurationError(f"--set wants key=value, got {item!r}", param=item)
        _assign(data, key.split("."), _parse_value(text, key), origin=f"--set {item}")
    return validate_run_config(data)


def validate_run_config(data: Mapping[str, Any]) -> RunConfig:
    """Turn pydantic's complaints into one readable message.

    Raises:
        ConfigurationError: listing every wrong key with its value.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as exc:
        problems = []
        for error in exc.errors():
            key = ".".join(str(part) for part in error["loc"]) or "configuration"
            # The value of an unknown key says nothing, and may be a password in a wrong place.
            hidden = error["type"] in ("missing", "value_error", "extra_forbidden")
            shown = "" if hidden else f" (got {error['input']!r})"
            problems.append(f"{key}: {error['msg'].removeprefix('Value error, ')}{shown}")
        first = ".".join(str(part) for part in exc.errors()[0]["loc"]) or None
        raise ConfigurationError("; ".join(problems), param=first) from exc


def dump_run_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that loads back to the same thing."""
    # Written out, the default would count as chosen and be checked against the context length.
    unset = {"sampling"} - config.trainer.model_fields_set
    # Likewise beside engine.pools, which have counts of their own.
    counts = {"count", "max_count"} if config.engine.pools else set[str]()
    data = config.model_dump(mode="json", exclude={"trainer": unset, "engine": counts})
    return yaml.safe_dump(data, sort_keys=False)


def _read_yaml(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"cannot read configuration {path}: {exc.strerror}") from exc
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise ConfigurationError(f"{path} is not valid YAML: {exc}") from exc
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path} must hold a mapping, not {type(data).__name__}")
    return data


def _parse_value(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise ConfigurationError(f"{key}: {text!r} is not valid YAML", param=key) from exc


def _assign(data: dict[str, Any], keys: Sequence[str], value: Any, origin: str) -> None:
    node = data
    for depth, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            path = ".".join(keys[: depth + 1])
            raise ConfigurationError(f"{origin}: {path} is a value, not a section", param=path)
        node = child
    node[keys[-1]] = value
