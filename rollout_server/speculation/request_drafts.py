"""How many of each request's drafts are worth a row of the target pass. Pure.

Looks at how earlier drafts of the request fared, never at the drafts themselves: trimming must not
depend on what was drafted, or the output would no longer be the policy's.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.speculation.acceptance import RequestAcceptance
from rollout_server.speculation.controller import SpeculationController


class RequestDrafts:
    """The requests of one engine that have been drafted for."""

    def __init__(self) -> None:
        self._acceptance: dict[str, RequestAcceptance] = {}

    def count(self, request_id: str, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """One verified draft."""
        acceptance = self._acceptance.setdefault(request_id, RequestAcceptance())
        acceptance.observe(num_draft_tokens, num_accepted_tokens)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._acceptance.pop(request_id, None)

    def worthwhile_lengths(
        self,
        request_ids: Sequence[str],
        draft_length: int,
        controller: SpeculationController,
        *,
        num_kv_tokens: int,
    ) -> list[int] | None:
        """[num_requests] drafts to verify; None where the policy does not look at requests."""
        if not controller.policy.per_request:
            return None
        floor = controller.min_survival(len(request_ids), num_kv_tokens, draft_length)
        per_pos = controller.acceptance.per_position()
        fresh = RequestAcceptance()
        return [
            self._acceptance.get(request_id, fresh).worthwhile_length(per_pos, floor, draft_length)
            for request_id in request_ids
        ]
