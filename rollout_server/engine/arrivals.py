"""Requests on their way into vLLM, so that an abort is not lost on one that it does not know yet.

Leans on vLLM 0.32.0: ``AsyncLLM.generate`` prepares a request in a thread before the output
processor has it, and ``OutputProcessor.abort_requests`` ignores what is not in
``external_req_ids``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

POLL_S = 0.002


class Arrivals:
    """Of one engine."""

    def __init__(self) -> None:
        self._under_way: set[str] = set()

    async def follow(self, request_id: str, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The same outputs; until they end the request counts as under way."""
        self._under_way.add(request_id)
        try:
            async for output in outputs:
                yield output
        finally:
            self._under_way.discard(request_id)

    async def until_registered(self, request_id: str, output_processor: Any) -> None:
        """Wait until vLLM knows a request that is under way; its end is an end of this, too."""
        registered = output_processor.external_req_ids
        while request_id in self._under_way and request_id not in registered:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)  # vLLM has no event for it
