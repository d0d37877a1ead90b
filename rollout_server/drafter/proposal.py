"""What a drafter proposed: the distribution every draft was drawn from. Pure torch.

Legend: B requests, K drafts each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

NOT_PROPOSED = -1


@dataclass(frozen=True, slots=True)
class Proposal:
    """Distributions of one draft cycle. Verification must use exactly these."""

    request_ids: Sequence[str]  # [B]
    probabilities_KBV: torch.Tensor | None
    """float32; None when every draft is the drafter's likeliest token (a greedy batch)."""
    row_of_request: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        rows = {request_id: row for row, request_id in enumerate(self.request_ids)}
        object.__setattr__(self, "row_of_request", rows)

    def rows(self, request_ids: Sequence[str]) -> list[int]:
        """Row of each request, ``NOT_PROPOSED`` where it was not in the cycle."""
        return [self.row_of_request.get(request_id, NOT_PROPOSED) for request_id in request_ids]


class ProposalBuffer:
    """Memory for the distributions, kept between cycles and grown when a cycle needs more."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._storage = torch.empty(0, dtype=torch.float32, device=device)

    def view(self, num_drafts: int, num_requests: int) -> torch.Tensor:
        """Uninitialised float32 [num_drafts, num_requests, V], contiguous."""
        size = num_drafts * num_requests * self._vocab_size
        if self._storage.numel() < size:
            self._storage = torch.empty(size, dtype=torch.float32, device=self._storage.device)
        return self._storage[:size].view(num_drafts, num_requests, self._vocab_size)
