"""The finished groups of one request, as the JSON that goes out, encoded once. Pure.

Streams, answers, repeated fetches and the ledger have the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from shared.schemas.rollouts import RolloutGroup, RolloutUsage

EMPTY_USAGE = RolloutUsage(
    num_prompt_tokens=0, num_completion_tokens=0, num_draft_tokens=0, num_accepted_tokens=0
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptGroup:
    """One finished group; it never changes."""

    prompt_index: int
    body: bytes
    """JSON of ``RolloutGroup``."""
    usage: RolloutUsage


def kept_group(group: RolloutGroup) -> KeptGroup:
    """Encode a group."""
    return KeptGroup(
        prompt_index=group.prompt_index,
        body=group.model_dump_json().encode(),
        usage=usage_of(group),
    )


class KeptGroups:
    """Those that are there, in order of finishing."""

    def __init__(self, num_groups: int, groups: Iterable[KeptGroup] = ()) -> None:
        self.num_groups = num_groups
        self.num_bytes = 0
        """Memory they take."""
        self.usage = EMPTY_USAGE
        self._groups: dict[int, KeptGroup] = {}  # by prompt index, in order of finishing
        for group in groups:
            self.add(group)

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, prompt_index: int) -> bool:
        return prompt_index in self._groups

    def __iter__(self) -> Iterator[KeptGroup]:
        return iter(self._groups.values())

    def add(self, group: KeptGroup) -> None:
        """Keep one more."""
        assert group.prompt_index not in self._groups, "a group finished twice"
        self._groups[group.prompt_index] = group
        self.num_bytes += len(group.body)
        self.usage = _sum(self.usage, group.usage)

    def bodies_after(self, num_seen: int) -> Sequence[bytes]:
        """Bodies of those that finished after the first ``num_seen``."""
        return [group.body for group in list(self._groups.values())[num_seen:]]

    def ordered_bodies(self) -> Iterator[bytes]:
        """All bodies, in the order of the prompts. Every group has to be there."""
        return (self._groups[index].body for index in range(self.num_groups))


def usage_of(group: RolloutGroup) -> RolloutUsage:
    """Its tokens; the prompt counts once."""
    return RolloutUsage(
        num_prompt_tokens=len(group.prompt_token_ids),
        num_completion_tokens=sum(len(sample.token_ids) for sample in group.samples),
        num_draft_tokens=sum(sample.num_draft_tokens for sample in group.samples),
        num_accepted_tokens=sum(sample.num_accepted_tokens for sample in group.samples),
    )


def _sum(one: RolloutUsage, other: RolloutUsage) -> RolloutUsage:
    return RolloutUsage(
        num_prompt_tokens=one.num_prompt_tokens + other.num_prompt_tokens,
        num_completion_tokens=one.num_completion_tokens + other.num_completion_tokens,
        num_draft_tokens=one.num_draft_tokens + other.num_draft_tokens,
        num_accepted_tokens=one.num_accepted_tokens + other.num_accepted_tokens,
    )
