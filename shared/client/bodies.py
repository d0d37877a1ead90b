"""Bodies to bytes and back, in the format that the headers name. No network here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from pydantic import BaseModel

from shared.client.headers import MSGPACK_TYPE
from shared.errors import EngineDeadError, OverloadedError, SlipstreamError, UnavailableError
from shared.schemas.rollouts import StreamLine

AnswerT = TypeVar("AnswerT", bound=BaseModel)

PASSING_CODES = frozenset({UnavailableError.code, OverloadedError.code, EngineDeadError.code})
"""Of errors in a stream that are answered with 429 or 503 elsewhere: worth another attempt."""


def encode_body(body: BaseModel | None, content_type: str) -> bytes | None:
    """Only the fields that are set: an older server refuses fields it does not know."""
    if body is None:
        return None
    if content_type == MSGPACK_TYPE:
        from shared.msgpack_bodies import pack  # optional for clients

        return pack(body.model_dump(mode="json", exclude_none=True))
    return body.model_dump_json(exclude_none=True).encode()


def decode_body(content: bytes, content_type: str, answer: type[AnswerT]) -> AnswerT:
    """Parse and validate an answer."""
    if content_type == MSGPACK_TYPE:
        from shared.msgpack_bodies import unpack

        return answer.model_validate(unpack(content))
    return answer.model_validate_json(content)


class LineReader:
    """Lines of a streamed answer from pieces of bytes; ``done`` or ``error`` has to be the last."""

    def __init__(self, what: str, url: str, content_type: str) -> None:
        self._what = what
        self._url = url
        self._rest = bytearray()
        self._is_done = False
        self._stream = None
        if content_type == MSGPACK_TYPE:
            from shared.msgpack_bodies import MsgpackStream

            self._stream = MsgpackStream()

    def feed(self, piece: bytes) -> Iterator[StreamLine]:
        """The lines that are complete with this piece.

        Raises:
            UnavailableError: the server gave up for a reason that passes.
            SlipstreamError: it gave up for another one; its reason.
        """
        if self._stream is not None:
            for value in self._stream.feed(piece):
                yield self._checked(StreamLine.model_validate(value))
            return
        # A line may be megabytes in many pieces: only the new piece is searched for its end.
        *ends, rest = piece.split(b"\n")
        for end in ends:
            self._rest += end
            line = bytes(self._rest)
            self._rest.clear()
            if line.strip():
                yield self._checked(StreamLine.model_validate_json(line))
        self._rest += rest

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            UnavailableError: the stream broke off.
        """
        if not self._is_done:
            raise UnavailableError(
                f"{self._what}: {self._url} closed the stream before the rollouts were done"
            )

    def _checked(self, line: StreamLine) -> StreamLine:
        if line.type == "error":
            reason = "no reason given" if line.error is None else line.error.message
            message = f"the server gave up on the rollouts: {reason}"
            # What passes: asked again, the server goes on from the groups it has.
            if line.error is not None and line.error.code in PASSING_CODES:
                raise UnavailableError(message)
            raise SlipstreamError(message)
        self._is_done = line.type == "done"
        return line
