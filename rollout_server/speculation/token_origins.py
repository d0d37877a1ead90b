"""How each token of a sample came about: drafted and accepted, or sampled by the target. Pure.

The scheduler notes every step of a request; what it notes travels with the finished request, in two
lists that vLLM has there for the purpose (vLLM 0.32.0: ``RequestSpecDecodeMetrics
.per_step_drafted`` and ``.per_step_accepted``, which level ``summary`` leaves empty)::

    tokens            5 without drafts   3 drafted, 1 accepted   3 drafted, all accepted
    per_step_drafted  -5                 3                       3
    per_step_accepted                    1                       3
    origins           p p p p p          a r                     a a a b
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.types import TokenOrigin


class OriginNotes:
    """Writes down the steps of an engine's requests. For vLLM's ``Scheduler.update_from_output``,
    which counts a request's verified drafts right before it gives the request its tokens."""

    def __init__(self) -> None:
        self._verified: tuple[str, int, int] | None = None

    def verified(self, request_id: str, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """The request is about to be given these tokens and one more."""
        self._verified = request_id, num_draft_tokens, num_accepted_tokens

    def given(self, request: Any, num_tokens: int) -> None:
        """A vLLM ``Request`` has been given tokens."""
        verified, self._verified = self._verified, None
        metrics = request.spec_decode_metrics
        if metrics is None or not num_tokens:  # None: this engine cannot speculate
            return
        if verified is not None and verified[0] == request.request_id:
            metrics.per_step_drafted.append(verified[1])
            metrics.per_step_accepted.append(verified[2])
        elif metrics.per_step_drafted and metrics.per_step_drafted[-1] < 0:
            metrics.per_step_drafted[-1] -= 1
        else:
            metrics.per_step_drafted.append(-1)


def token_origins(
    per_step_drafted: Sequence[int], per_step_accepted: Sequence[int], num_tokens: int
) -> str:
    """A letter per token (``TokenOrigin``).

    A step that ended the request may have brought more tokens than it kept, and tokens that are in
    no step have an unknown origin.
    """
    parts: list[str] = []
    accepted = iter(per_step_accepted)
    for num_drafted in per_step_drafted:
        if num_drafted < 0:
            parts.append(TokenOrigin.PLAIN * -num_drafted)
            continue
        num_accepted = next(accepted)
        last = TokenOrigin.BONUS if num_accepted == num_drafted else TokenOrigin.RECOVERED
        parts.append(TokenOrigin.ACCEPTED * num_accepted + last)
    return "".join(parts)[:num_tokens].ljust(num_tokens, TokenOrigin.UNKNOWN)
