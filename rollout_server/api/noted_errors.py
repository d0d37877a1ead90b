"""Which error codes the request being served has answered with, for ``errors_total{code}``.

Errors are made in many places and some inside a stream whose status is out already; all of them run
in the context of their request, so a context variable brings them to the middleware.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CODES: ContextVar[list[str] | None] = ContextVar("error_codes", default=None)


@contextmanager
def noted_errors() -> Iterator[list[str]]:
    """The list that ``note_error`` fills while one request is served."""
    codes: list[str] = []
    token = _CODES.set(codes)
    try:
        yield codes
    finally:
        _CODES.reset(token)


def note_error(code: str) -> None:
    """The client is told ``code``: in an error answer, or in a stream."""
    codes = _CODES.get()
    if codes is not None:
        codes.append(code)
