"""Every setting with its type, default, limits and meaning, read from the models."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from shared.config.base import SettingsModel
from shared.config.run import RunConfig

TOP_LEVEL = "top level"
EACH = "[]"
"""After the key of a list whose entries have settings of their own."""

Schema = Mapping[str, Any]

_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "pattern": "matches `{}`",
}
_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One key of the configuration."""

    key: str
    """With the section: ``engine.count``."""
    type: str
    default: str
    limits: str
    meaning: str
    values: Mapping[str, str]
    """What each of its values means, where these are named; empty elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """The settings under one key."""

    key: str
    """Empty for the top level."""
    title: str
    meaning: str
    settings: tuple[Setting, ...]


def sections(model: type[SettingsModel] = RunConfig) -> list[Section]:
    """All of them, in the order of the models."""
    schema = model.model_json_schema()
    return list(_sections(schema, schema["$defs"], key="", title=TOP_LEVEL))


def setting_keys() -> list[str]:
    """Every key that ``--set`` takes a value for."""
    keys = (item.key for section in sections() for item in section.settings)
    # Variants of a section share keys; a list is given as a whole.
    return list(dict.fromkeys(key for key in keys if EACH not in key))


def _sections(schema: Schema, defs: Schema, *, key: str, title: str) -> Iterator[Section]:
    settings = []
    below: list[Section] = []
    for name, field in schema["properties"].items():
        path = f"{key}.{name}" if key else name
        variants = _variants(field, defs)
        if not variants:
            settings.append(_setting(path, field, defs, name in schema.get("required", ())))
            continue
        if field.get("type") == "array":
            settings.append(_setting(path, field, defs, name in schema.get("required", ())))
            path += EACH
        for variant in variants:
            below += _sections(variant, defs, key=path, title=_title(path, field, variant))
    meaning = _text(schema.get("description", ""))
    yield Section(key=key, title=title, meaning=meaning, settings=tuple(settings))
    yield from below


def _variants(field: Schema, defs: Schema) -> list[Schema]:
    """The models a field, or each entry of a list, may hold; none where values are plain."""
    items = field.get("items", {})
    options = [field, *field.get("anyOf", ()), *field.get("oneOf", ()), items]
    resolved = [_resolved(option, defs) for option in options]
    return [option for option in resolved if "properties" in option]


def _title(path: str, field: Schema, variant: Schema) -> str:
    if "discriminator" in field:
        tag = field["discriminator"]["propertyName"]
        return f"`{path}` with `{tag}: {variant['properties'][tag]['const']}`"
    if path.endswith(EACH):
        return f"`{path.removesuffix(EACH)}` (each entry)"
    # What has no default of its own is not there until it is written.
    return f"`{path}`" + (" (may be left out)" if field.get("default", "") is None else "")


def _setting(path: str, field: Schema, defs: Schema, is_required: bool) -> Setting:
    forms = (field, *field.get("anyOf", ()))
    options = [_resolved(form, defs) for form in forms]
    limits = [
        text.format(_number(option[name]))
        for option in options
        for name, text in _LIMITS.items()
        if name in option
    ]
    values: dict[str, str] = {}
    for form, option in zip(forms, options, strict=True):
        if "enum" in option and "$ref" in form:  # an enum; a Literal's values speak for themselves
            values |= _value_meanings(option["title"])
    return Setting(
        key=path,
        type=_type(field, defs),
        default="required" if is_required else _value(_default(field)),
        limits=", ".join(limits),
        meaning=_text(field.get("description", "")),
        values=values,
    )


def _type(field: Schema, defs: Schema) -> str:
    schema = _resolved(field, defs)
    if "anyOf" in schema:
        names = [_type(option, defs) for option in schema["anyOf"]]
        # An absent value is the last resort, so it comes last.
        return " or ".join(sorted(names, key="null".__eq__))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            items = {_type(item, defs) for item in schema["prefixItems"]}
            return f"{len(schema['prefixItems'])} of {' and '.join(sorted(items))}"
        return f"list of {_type(schema['items'], defs)}"
    if "properties" in schema:
        return "section"
    if kind == "object":
        return f"map of text to {_type(schema.get('additionalProperties', {}), defs)}"
    return _WORDS.get(str(kind), "null" if kind == "null" else "any value")


def _resolved(field: Schema, defs: Schema) -> Schema:
    reference = field.get("$ref")
    if reference is None:
        return field
    resolved: Schema = defs[reference.rpartition("/")[2]]
    return resolved


def _default(field: Schema) -> object:
    # A schema says nothing of what a factory makes: all of them make something empty.
    empty: dict[object, object] = {"array": [], "object": {}}
    return field.get("default", empty.get(field.get("type")))


def _value(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _number(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value


def _text(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`")


@cache
def _value_meanings(enum_name: str) -> dict[str, str]:
    """By value: the text under each member of an enum of ours."""
    (enum,) = (kind for kind in StrEnum.__subclasses__() if kind.__name__ == enum_name)
    tree = ast.parse(inspect.getsource(enum))
    definition = tree.body[0]
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    value = ""
    for node in definition.body:
        if isinstance(node, ast.Assign):
            value = ast.literal_eval(node.value)
            found[value] = ""
        elif value and isinstance(node, ast.Expr):
            found[value] = _text(ast.literal_eval(node.value))
    return found
