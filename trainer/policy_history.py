"""How many updates ago a token's policy was the trainer's own (pure).

The number of a version does not tell. A resumed trainer gives weights that it has already pushed a
new number, and the numbers in between belong to updates that were lost with the process before::

    revision   0  1  2  3   killed, resumed at 2    2  3
    version    4  5  6  7                           8  9

At version 9 the lag of versions 6 and 8 is 1, that of 5 is 2. Version 7 is nobody's any more: what
was sampled from it is as unknown as if somebody else had pushed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from shared.schemas.rollouts import WeightVersionSpan

NUM_REVISIONS_KEPT = 1000
"""Versions of older revisions are forgotten: their lag counts as unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyHistory:
    """Which weights each version stood for."""

    revision: int = 0
    """Training steps so far that changed the policy."""
    versions: Mapping[int, int] = field(default_factory=dict)
    """Revision by weight version."""

    def updated(self) -> PolicyHistory:
        """The policy was changed; no version stands for it yet."""
        return replace(self, revision=self.revision + 1)

    def served(self, version: int) -> PolicyHistory:
        """The policy as it is now was committed as ``version``."""
        oldest = self.revision - NUM_REVISIONS_KEPT
        kept = {known: revision for known, revision in self.versions.items() if revision > oldest}
        return replace(self, versions=kept | {version: self.revision})

    def lag_of(self, version: int) -> int | None:
        """Updates since the policy was what ``version`` stands for; None where that is unknown."""
        revision = self.versions.get(version)
        return None if revision is None else self.revision - revision

    def lag(self, spans: Iterable[WeightVersionSpan]) -> int | None:
        """That of the oldest token; 0 without tokens, None where one's version is unknown."""
        lags = [self.lag_of(span.version) for span in spans]
        known = [lag for lag in lags if lag is not None]
        return max(known, default=0) if len(known) == len(lags) else None
