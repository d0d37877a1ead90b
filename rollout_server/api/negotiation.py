"""Reads ``Accept`` and ``Accept-Encoding``. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def qualities(header: str, names: Iterable[str]) -> dict[str, float]:
    """How much a caller likes each of ``names``, 0 to 1; 0 for what the header does not name.

    Wildcards count for nothing: whoever wants something other than the default names it.
    """
    liked = dict.fromkeys(names, 0.0)
    for item in header.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        if name in liked:
            liked[name] = _quality(parameters)
    return liked


def _quality(parameters: Iterable[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                return 0.0
            return min(max(quality, 0.0), 1.0) if quality == quality else 0.0  # nan
    return 1.0
