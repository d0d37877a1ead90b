"""``connection`` for programs that run an event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

import httpx

from shared.client.bodies import AnswerT, LineReader, decode_body
from shared.client.calls import Call
from shared.client.connection import Endpoint, content_type_of
from shared.client.failures import error_from_response, mapped
from shared.schemas.rollouts import StreamLine


class AsyncConnection:
    """Sends calls to an endpoint, from one event loop. Raises what ``Connection`` raises."""

    def __init__(
        self, endpoint: Endpoint, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.endpoint = endpoint
        self._http = httpx.AsyncClient(
            base_url=endpoint.url,
            headers=endpoint.headers,
            verify=endpoint.verification,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[AnswerT]) -> AnswerT:
        """One answer, parsed."""
        endpoint = self.endpoint
        timeout = endpoint.timeout(call)
        with mapped(call.what, endpoint.url, timeout, endpoint.wording):
            response = await self._http.request(
                call.method, call.path, content=endpoint.content(call), timeout=timeout
            )
            if response.status_code >= 400:
                raise error_from_response(response)
            return decode_body(response.content, content_type_of(response), call.answer)

    async def lines(self, call: Call[StreamLine]) -> AsyncGenerator[StreamLine, None]:
        """The lines of a streamed answer; ``done`` is the last one."""
        endpoint = self.endpoint
        timeout = endpoint.timeout(call)
        with mapped(call.what, endpoint.url, timeout, endpoint.wording):
            async with self._http.stream(
                call.method, call.path, content=endpoint.content(call), timeout=timeout
            ) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise error_from_response(response)
                reader = LineReader(call.what, endpoint.url, content_type_of(response))
                async for piece in response.aiter_bytes():
                    for line in reader.feed(piece):
                        yield line
                        if line.type == "done":
                            return
                reader.finish()
