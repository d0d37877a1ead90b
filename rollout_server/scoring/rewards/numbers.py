"""Finds numbers in text and reads them exactly.

| text                | value  |
|---------------------|--------|
| ``1,234.50``        | 2469/2 |
| ``-3/4``            | -3/4   |
| ``\\frac{3}{4}``     | 3/4    |
| ``7 - 5``, ``7-5``  | 7, 5   |
| ``2.5e3``           | 2500   |
| ``x2``, ``1/0``     | nothing|
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_NUMBER_CHARS = 256
"""Longer runs of digits are no number: exact arithmetic on them would take a worker's time."""

_MAGNITUDE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+"
# A sign after a digit, a letter or a closing bracket is an operator. A digit after a letter is part
# of a name; after "digit." it is the rest of something like 1.2.3.
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w.)\]}}])[-+−])?
    (?<!\w)(?<![0-9]\.)
    (?P<magnitude>{_MAGNITUDE})
    (?P<exponent>[eE][-+]?[0-9]{{1,3}}(?!\w))?
    (?:[ ]?/[ ]?(?P<denominator>[0-9]+(?!\.?[0-9])))?
    """,
    re.VERBOSE | re.ASCII,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", re.ASCII)


def find_numbers(text: str) -> Iterator[Fraction]:
    """Yield the numbers of a text from left to right."""
    for match in _NUMBER.finditer(_LATEX_FRACTION.sub(r"\1/\2", text)):
        if match.end() - match.start() > MAX_NUMBER_CHARS:
            continue
        value = Fraction(match["magnitude"].replace(",", "") + (match["exponent"] or ""))
        if match["denominator"] is not None:
            denominator = int(match["denominator"])
            if denominator == 0:
                continue
            value /= denominator
        yield -value if match["sign"] in ("-", "−") else value


def first_number(text: str) -> Fraction | None:
    """The first number of a text."""
    return next(find_numbers(text), None)


def last_number(text: str) -> Fraction | None:
    """The last number of a text."""
    value = None
    for value in find_numbers(text):  # noqa: B007 - the last one is wanted
        pass
    return value
