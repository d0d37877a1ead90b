"""What is known of a sample that more than one engine works on. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_server.engine.protocol import GeneratedSample
from shared.schemas.rollouts import WeightVersionSpan
from shared.types import TokenOrigin


@dataclass(kw_only=True, slots=True)
class Prefix:
    """What is known of an unfinished sample."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[WeightVersionSpan] = field(default_factory=list)
    num_draft_tokens: int = 0
    """Of engines that told; those of dead ones went with them."""
    num_accepted_tokens: int = 0
    token_origins: str = ""
    """As in samples: a letter each, or none at all."""


def all_of(sample: GeneratedSample) -> Prefix:
    """Everything an engine has of it."""
    return Prefix(
        token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        weight_versions=sample.weight_versions,
        num_draft_tokens=sample.num_draft_tokens,
        num_accepted_tokens=sample.num_accepted_tokens,
        token_origins=sample.token_origins,
    )


def joined(given: Prefix, gained: Prefix) -> Prefix:
    """Both, one behind the other; spans of one version that meet become one."""
    num_given = len(given.token_ids)
    spans = list(given.weight_versions)
    for span in gained.weight_versions:
        start, end = span.start + num_given, span.end + num_given
        if spans and spans[-1].version == span.version and spans[-1].end == start:
            start = spans.pop().start
        spans.append(WeightVersionSpan(version=span.version, start=start, end=end))
    return Prefix(
        token_ids=[*given.token_ids, *gained.token_ids],
        logprobs=[*given.logprobs, *gained.logprobs],
        weight_versions=spans,
        num_draft_tokens=given.num_draft_tokens + gained.num_draft_tokens,
        num_accepted_tokens=given.num_accepted_tokens + gained.num_accepted_tokens,
        token_origins=_joined_origins(given, gained),
    )


def _joined_origins(given: Prefix, gained: Prefix) -> str:
    if not (given.token_origins or gained.token_origins):
        return ""
    return "".join(
        prefix.token_origins.ljust(len(prefix.token_ids), TokenOrigin.UNKNOWN)
        for prefix in (given, gained)
    )
