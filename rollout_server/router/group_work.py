"""One group on its way through engines that may die: what is done, what is left. Pure.

A group starts as one request for all its samples. When its engine dies, samples that had finished
are kept; of the others, what was sampled becomes a prefix, and the next engine is asked for the
rest of each::

    attempt 1   a: 0 1 2 3 4 5 |end      b: 0 1 2 3 4 (dies)    c: (dies)
    attempt 2                            b: prompt + 0..4, n=1   c: prompt, n=1

Sampling goes on from the prefix as it would have: a token's distribution depends on the tokens
before it and on the request, not on who sampled them. Where that is not so the sample starts over:
with a seed (its random stream has been used up to there), with presence or frequency penalties
(they count sampled tokens, and the prefix would be prompt), with stop strings (one may begin in the
prefix).

A late group may also leave an engine that lives (``stragglers.py`` says when, and why that changes
no distribution). It is ended there like an aborted one, and its aborted samples go on elsewhere::

    attempt 1   a: 0 1 2 3 |end      b: 0 1 2 3 4 5 (told to stop)
    attempt 2                        b: prompt + 0..5, n=1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rollout_server.engine.protocol import (
    GeneratedSample,
    GenerateRequest,
    GenerateResult,
    KnownTokens,
    SampleProgress,
)
from rollout_server.router.prefixes import Prefix, all_of, joined
from rollout_server.router.stragglers import HANDOVER_TRANSITIONS, Handover
from shared.schemas.rollouts import SamplingOptions
from shared.types import FinishReason

CompletionText = Callable[[list[int], list[int]], str]
"""Text of completion tokens after these prompt tokens."""


def can_continue(sampling: SamplingOptions) -> bool:
    """Whether the rest of a sample may be sampled by a request of its own."""
    return (
        sampling.seed is None
        and not sampling.stop
        and sampling.presence_penalty == 0
        and sampling.frequency_penalty == 0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One request of an attempt; its samples are these of the group, in this order."""

    request: GenerateRequest
    sample_indices: tuple[int, ...]


class GroupWork:
    """The state of one group.

    Args:
        completion_text: makes the text of samples that more than one engine worked on.
        may_continue: False starts unfinished samples over when an engine dies.
        num_wanted: with fewer than ``request.n``, the samples that finish first are the group.
    """

    def __init__(
        self,
        request: GenerateRequest,
        completion_text: CompletionText,
        *,
        may_continue: bool,
        num_wanted: int | None = None,
    ) -> None:
        self._request = request
        self._num_wanted = request.n if num_wanted is None else num_wanted
        self._completion_text = completion_text
        self._may_continue = may_continue and can_continue(request.sampling)
        self._finished: dict[int, GeneratedSample] = {}
        """In order of finishing, as far as that is known."""
        self._given: dict[int, Prefix] = {index: Prefix() for index in range(request.n)}
        """What the pieces of this attempt were given to go on from, by unfinished sample."""
        self._gained: dict[int, Prefix] = {}
        """What is known of this attempt's own tokens."""
        self._attempt = 1
        self._handover = Handover.NOT_YET

    @property
    def may_hand_over(self) -> bool:
        """Whether its unfinished samples may leave the engine they are on."""
        return self._may_continue and self._handover is Handover.NOT_YET

    @property
    def num_unfinished(self) -> int:
        """Samples an engine is still needed for."""
        return self._request.n - len(self._finished)

    @property
    def has_enough(self) -> bool:
        """Whether the wanted samples have finished, so that the others need not."""
        ended = sum(s.finish_reason is not FinishReason.ABORT for s in self._finished.values())
        return ended >= self._num_wanted

    @property
    def needs_news(self) -> bool:
        """Whether anything comes of knowing what runs: a prefix to go on from, an early end."""
        return self._may_continue or self._num_wanted < self._request.n

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that this attempt does not have to sample again."""
        return sum(len(prefix.token_ids) for prefix in self._given.values()) + (
            sum(len(sample.token_ids) for sample in self._finished.values())
        )

    def pieces(self) -> list[Piece]:
        """The requests of this attempt: samples without a prefix together, the others alone."""
        request = self._request
        fresh = tuple(i for i, prefix in self._given.items() if not prefix.token_ids)
        pieces = []
        if fresh:
            name = request.request_id if self._attempt == 1 else self._name("fresh")
            whole = replace(request, request_id=name, n=len(fresh))
            pieces.append(Piece(request=whole, sample_indices=fresh))
        for index, prefix in self._given.items():
            if num_given := len(prefix.token_ids):
                sampling = request.sampling
                shorter = {
                    "max_tokens": sampling.max_tokens - num_given,
                    "min_tokens": max(0, sampling.min_tokens - num_given),
                }
                rest = replace(
                    request,
                    request_id=self._name(f"sample={index}"),
                    prompt_token_ids=[*request.prompt_token_ids, *prefix.token_ids],
                    n=1,
                    sampling=sampling.model_copy(update=shorter),
                )
                pieces.append(Piece(request=rest, sample_indices=(index,)))
        return pieces

    def known(self, piece: Piece) -> KnownTokens:
        """What need not be told again about a piece, in its own sample numbers."""
        return KnownTokens(
            num_tokens={
                number: len(self._gained[index].token_ids)
                for number, index in enumerate(piece.sample_indices)
                if index in self._gained
            },
            finished=frozenset(
                number
                for number, index in enumerate(piece.sample_indices)
                if index in self._finished
            ),
        )

    def note(self, piece: Piece, progress: Sequence[SampleProgress]) -> None:
        """Take in what an engine has. What comes late, twice or out of order changes nothing."""
        for news in progress:
            index = piece.sample_indices[news.sample_index]
            if index in self._finished:
                continue
            if news.whole is not None:
                if not self._goes_on(news.whole):  # else ``take`` has it all
                    self._finish(index, news.whole)
                continue
            gained = self._gained.setdefault(index, Prefix())
            if news.start != len(gained.token_ids):
                continue
            gained.token_ids.extend(news.token_ids)
            gained.logprobs.extend(news.logprobs)
            gained.weight_versions = news.weight_versions

    def take(self, piece: Piece, result: GenerateResult) -> None:
        """The piece has come back whole."""
        for sample in result.samples:
            index = piece.sample_indices[sample.sample_index]
            if index in self._finished:
                continue
            if self._goes_on(sample):
                self._given[index] = joined(self._given[index], all_of(sample))
                self._gained.pop(index, None)
            else:
                self._finish(index, sample)

    def begin_handover(self) -> None:
        """The engine is being told to stop; ``engine_left`` or ``engine_died`` follows."""
        self._move(Handover.STOPPING)

    def engine_left(self) -> None:
        """Every piece has come back: get ready for the attempt elsewhere."""
        self._move(Handover.DONE)
        self._attempt += 1
        self._gained = {}

    def engine_died(self) -> None:
        """Get ready for the next attempt with what is known of this one."""
        if self._handover is Handover.STOPPING:
            self._move(Handover.DONE)
        self._attempt += 1
        for index, gained in self._gained.items():
            if self._may_continue and index in self._given:
                whole = joined(self._given[index], gained)
                # An engine never reports a sample as running that has all its tokens; should one,
                # the sample goes on from what it was given.
                if len(whole.token_ids) < self._request.sampling.max_tokens:
                    self._given[index] = whole
        self._gained = {}

    def end_as_aborted(self) -> None:
        """Finish what is unfinished with what there is."""
        for index, given in list(self._given.items()):
            whole = joined(given, self._gained.get(index, Prefix()))
            self._finished[index] = GeneratedSample(
                sample_index=index,
                token_ids=whole.token_ids,
                logprobs=whole.logprobs,
                text=self._text(whole.token_ids),
                finish_reason=FinishReason.ABORT,
                weight_versions=whole.weight_versions,
                num_draft_tokens=whole.num_draft_tokens,
                num_accepted_tokens=whole.num_accepted_tokens,
                token_origins=whole.token_origins,
            )
        self._given = {}

    def samples(self) -> list[GeneratedSample]:
        """The wanted ones, numbered from 0. Only when none is unfinished."""
        assert not self._given, "samples are unfinished"
        # Stable: those that were ended come after those that ended by themselves.
        first = sorted(
            self._finished.values(), key=lambda s: s.finish_reason is FinishReason.ABORT
        )[: self._num_wanted]
        in_order = sorted(first, key=lambda sample: sample.sample_index)
        return [replace(sample, sample_index=index) for index, sample in enumerate(in_order)]

    def _finish(self, index: int, sample: GeneratedSample) -> None:
        given = self._given.pop(index)
        self._gained.pop(index, None)
        whole = joined(given, all_of(sample))
        self._finished[index] = GeneratedSample(
            sample_index=index,
            token_ids=whole.token_ids,
            logprobs=whole.logprobs,
            text=self._text(whole.token_ids) if given.token_ids else sample.text,
            finish_reason=sample.finish_reason,
            weight_versions=whole.weight_versions,
            num_draft_tokens=whole.num_draft_tokens,
            num_accepted_tokens=whole.num_accepted_tokens,
            token_origins=whole.token_origins,
        )

    def _goes_on(self, sample: GeneratedSample) -> bool:
        """Whether a sample that came back whole was only told to stop."""
        is_stopped = sample.finish_reason is FinishReason.ABORT
        return is_stopped and self._handover is Handover.STOPPING

    def _move(self, handover: Handover) -> None:
        assert handover in HANDOVER_TRANSITIONS[self._handover], f"{self._handover} to {handover}"
        self._handover = handover

    def _text(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._completion_text(self._request.prompt_token_ids, token_ids)

    def _name(self, part: str) -> str:
        return f"{self._request.request_id}/attempt={self._attempt}/{part}"


def aborted_result(request: GenerateRequest) -> GenerateResult:
    """Of a request that was aborted before any engine began it: ``n`` empty samples."""
    work = GroupWork(request, lambda prompt, token_ids: "", may_continue=False)
    work.end_as_aborted()
    return GenerateResult(engine_id="", samples=work.samples(), generate_s=0.0)
