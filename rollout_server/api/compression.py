"""Compresses large answers for callers that accept it, as plain ASGI (streams stay streams).

Every piece of a streamed answer is flushed through the compressor, so that a finished group is not
held back until the next one. Server-sent events are left alone: they are small and urgent.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Protocol

import zstandard
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.api.negotiation import qualities

COMPRESSIBLE_TYPES = frozenset(
    {"application/json", "application/x-ndjson", "application/msgpack", "text/plain"}
)
GZIP_LEVEL = 1
ZSTD_LEVEL = 1
"""Token ids and logprobs get hardly smaller with more effort."""
THREAD_BYTES = 1 << 16
"""Larger pieces are compressed in a thread; the event loop goes on meanwhile."""


class Compression:
    """Compresses whole answers of at least ``min_bytes``, and streamed ones."""

    def __init__(self, app: ASGIApp, min_bytes: int) -> None:
        self._app = app
        self._min_bytes = min_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        encoding = None
        if scope["type"] == "http":
            encoding = chosen_encoding(Headers(scope=scope).get("accept-encoding", ""))
        if encoding is None:
            await self._app(scope, receive, send)
            return
        sender = _CompressingSender(send, encoding, self._min_bytes)
        await self._app(scope, receive, sender.send)


class _CompressingSender:
    """One answer on its way out."""

    def __init__(self, send: Send, encoding: str, min_bytes: int) -> None:
        self._send = send
        self._encoding = encoding
        self._min_bytes = min_bytes
        self._start: Message | None = None
        self._compressor: _Compressor | None = None

    async def send(self, message: Message) -> None:
        """Stands in for the server's ``send``."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if _can_be_compressed(headers):
                headers.add_vary_header("Accept-Encoding")
                if "content-length" in headers:  # whole: its size decides, and changes
                    self._start = message
                    return
                self._begin(headers)
            await self._send(message)
        elif message["type"] == "http.response.body":
            body, is_last = message.get("body", b""), not message.get("more_body", False)
            if self._start is not None:
                start, self._start = self._start, None
                if is_last and len(body) >= self._min_bytes:
                    headers = MutableHeaders(scope=start)
                    self._begin(headers)
                    body = await self._compressed(body, is_last)
                    headers["content-length"] = str(len(body))
                await self._send(start)
            elif self._compressor is not None:
                body = await self._compressed(body, is_last)
            await self._send({**message, "body": body})
        else:
            await self._send(message)

    def _begin(self, headers: MutableHeaders) -> None:
        self._compressor = _ZstdCompressor() if self._encoding == "zstd" else _GzipCompressor()
        headers["content-encoding"] = self._encoding

    async def _compressed(self, body: bytes, is_last: bool) -> bytes:
        compressor = self._compressor
        assert compressor is not None
        if len(body) < THREAD_BYTES:
            return compressor.piece(body, is_last)
        return await asyncio.to_thread(compressor.piece, body, is_last)


class _Compressor(Protocol):
    def piece(self, body: bytes, is_last: bool) -> bytes:
        """Compressed, so that the reader can decompress all of it at once."""
        ...


class _GzipCompressor:
    def __init__(self) -> None:
        self._compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)

    def piece(self, body: bytes, is_last: bool) -> bytes:
        mode = zlib.Z_FINISH if is_last else zlib.Z_SYNC_FLUSH
        return self._compressor.compress(body) + self._compressor.flush(mode)


class _ZstdCompressor:
    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()

    def piece(self, body: bytes, is_last: bool) -> bytes:
        mode = zstandard.COMPRESSOBJ_FLUSH_FINISH if is_last else zstandard.COMPRESSOBJ_FLUSH_BLOCK
        return self._compressor.compress(body) + self._compressor.flush(mode)


def _can_be_compressed(headers: Headers) -> bool:
    content_type = headers.get("content-type", "").partition(";")[0]
    return content_type in COMPRESSIBLE_TYPES and "content-encoding" not in headers


def chosen_encoding(accepted: str) -> str | None:
    """``zstd`` or ``gzip`` of an ``Accept-Encoding`` header; None for neither."""
    liked = qualities(accepted, ("zstd", "gzip"))
    best = max(liked, key=lambda name: liked[name])  # zstd where both are as welcome
    return best if liked[best] > 0.0 else None
