"""Between requests and what the ledger has of them. Pure, but for the tokenizer."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

from pydantic import ValidationError

from rollout_server.collaborators import Scorer, Tokenizer
from rollout_server.engine.protocol import ModelInfo
from rollout_server.rollouts.kept_groups import KeptGroups
from rollout_server.rollouts.ledger_records import KeptRequest, LedgerState
from rollout_server.rollouts.prompts import PreparedPrompt, prepare_prompts
from shared.errors import SlipstreamError, error_of_code
from shared.schemas.rollouts import RolloutRequest

GENERATED_ID_PREFIX = "rollout-"


def body_of(request: RolloutRequest) -> bytes:
    """JSON of what is asked for. How the answer is delivered (``stream``) is no part of it."""
    return request.model_dump_json(exclude={"stream", "request_id"}).encode()


def body_to_record(body: bytes, request_id: str | None) -> bytes:
    """A body with the name its caller gave the request: without one nobody can ask for it again."""
    return body if request_id is None else b'{"request_id":"%b",' % request_id.encode() + body[1:]


def generated_request_id() -> str:
    """Of a request without a name."""
    return f"{GENERATED_ID_PREFIX}{uuid.uuid4().hex}"


def digest_of(body: bytes) -> bytes:
    """Tells bodies apart."""
    return hashlib.blake2b(body, digest_size=16).digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredRequest:
    """A request of an earlier process, ready to go on or to be fetched."""

    kept: KeptRequest
    request: RolloutRequest
    digest: bytes
    groups: KeptGroups
    prompts: list[PreparedPrompt]
    """Of the groups that are missing; none for one that has ended."""
    error: SlipstreamError | None
    """How it ended, or why it cannot go on."""

    @property
    def is_for_nobody(self) -> bool:
        """It went with the connection it came by: its caller had given it no name."""
        is_unnamed = self.request.request_id is None
        # A name of a caller's own is in the body since ledgers have it there.
        return is_unnamed and self.kept.request_id.startswith(GENERATED_ID_PREFIX)


def restored(
    kept: KeptRequest,
    *,
    is_unfinished: bool,
    tokenizer: Tokenizer,
    model: ModelInfo,
    scorer: Scorer,
) -> RestoredRequest:
    """Read a request again. Slow for large ones: run it in a thread.

    Raises:
        ValueError: its body is of another version of this program, or groups are missing.
    """
    try:
        request = RolloutRequest.model_validate_json(kept.body)
    except ValidationError as exc:
        raise ValueError(f"its body cannot be read ({exc.error_count()} errors)") from exc
    groups = KeptGroups(kept.num_groups, kept.groups)
    if kept.state is LedgerState.FINISHED and len(groups) < groups.num_groups:
        raise ValueError(f"{len(groups)} of its {groups.num_groups} groups are there")
    error = None
    prompts: list[PreparedPrompt] = []
    if kept.error is not None:
        error = error_of_code(kept.error.code, kept.error.message, kept.error.param)
    if is_unfinished:
        try:
            prompts = _missing_prompts(request, groups, tokenizer, model, scorer)
        except SlipstreamError as exc:
            error = exc  # other rewards, another model: what was accepted cannot be done any more
    return RestoredRequest(
        kept=kept,
        request=request,
        # Not the recorded one: a newer version may write the same request in other words.
        digest=digest_of(body_of(request)),
        groups=groups,
        prompts=prompts,
        error=error,
    )


def missing(prompts: list[PreparedPrompt], groups: KeptGroups) -> list[PreparedPrompt]:
    """Prompts whose groups are not there."""
    return [prompt for prompt in prompts if prompt.prompt_index not in groups]


def _missing_prompts(
    request: RolloutRequest,
    groups: KeptGroups,
    tokenizer: Tokenizer,
    model: ModelInfo,
    scorer: Scorer,
) -> list[PreparedPrompt]:
    if request.reward is not None:
        scorer.validate_reward(request.reward)
    prompts = prepare_prompts(request.prompts, tokenizer, model, request.sampling.max_tokens)
    return missing(prompts, groups)
