"""Reward for a completion that is made of the sections it was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rollout_server.scoring.signature import RewardParamError

DEFAULT_TAGS = ("think", "answer")
MAX_TAGS = 16
_TAG = re.compile(r"[^<>/\s]{1,64}")


def tag_format(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    tags: list[str] | None = None,
    strict: bool = True,
    partial: bool = False,
    correct: float = 1.0,
    wrong: float = 0.0,
) -> tuple[float, dict[str, Any]]:
    """``correct`` when every section is there, once and in order, else ``wrong``.

    ``<think>...</think><answer>...</answer>``: both tags of a section occur exactly once, wherever
    they stand, sections do not overlap, and none is blank. Where the prompt ends with the first
    opening tag, as templates of reasoning models do, the completion goes on inside that section.

    Args:
        tags: names of the sections; absent stands for think and answer.
        strict: nothing but white space stands outside of the sections.
        partial: the share of what is right (each section, and with ``strict`` that nothing stands
            outside) decides between ``wrong`` and ``correct``.
    """
    names = DEFAULT_TAGS if tags is None else tuple(tags)
    opening = f"<{names[0]}>"
    text = opening + completion if prompt.rstrip().endswith(opening) else completion
    bad, outside = _read_sections(text, names)
    has_text_outside = bool(outside.strip())
    num_rules = len(names) + strict
    num_broken = len(bad) + (strict and has_text_outside)
    detail = {"bad_tags": bad, "text_outside": has_text_outside}
    if num_broken == 0:
        return correct, detail
    if partial:
        return wrong + (correct - wrong) * (num_rules - num_broken) / num_rules, detail
    return wrong, detail


def _read_sections(text: str, names: tuple[str, ...]) -> tuple[list[str], str]:
    """Names of the sections that are not as they should be, and the text outside of the others."""
    bad = []
    outside = []
    position = 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        begin, end = text.find(opening), text.find(closing)
        is_single = text.count(opening) == text.count(closing) == 1
        content = text[begin + len(opening) : end]
        if is_single and position <= begin < end and content.strip():
            outside.append(text[position:begin])
            position = end + len(closing)
        else:
            bad.append(name)
    outside.append(text[position:])
    return bad, "".join(outside)


def check_tag_format_params(params: Mapping[str, Any]) -> None:
    """Refuse what names no sections.

    Raises:
        RewardParamError: naming the parameter and its value.
    """
    tags = params.get("tags")
    if tags is None:
        return
    if not isinstance(tags, list) or not 1 <= len(tags) <= MAX_TAGS:
        raise RewardParamError("tags", f"is not a list of 1 to {MAX_TAGS} names")
    for tag in tags:
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise RewardParamError(
                "tags", f"has {tag!r}, which is no name of at most 64 characters without <, > and /"
            )
    if len(set(tags)) < len(tags):
        raise RewardParamError("tags", "names a section twice")
