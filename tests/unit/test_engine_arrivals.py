"""An abort waits for a request that vLLM has not registered yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from rollout_server.engine.arrivals import Arrivals
from tests.fakes.service import until


class OutputProcessor:
    """What ``Arrivals`` reads of vLLM's."""

    def __init__(self) -> None:
        self.external_req_ids: set[str] = set()


async def test_an_abort_waits_for_what_is_under_way_and_for_nothing_else() -> None:
    arrivals, may_end, vllm = Arrivals(), asyncio.Event(), OutputProcessor()

    async def outputs() -> AsyncIterator[str]:
        await may_end.wait()
        yield "all"

    async def generate() -> list[str]:
        return [output async for output in arrivals.follow("g", outputs())]

    await arrivals.until_registered("unknown", vllm)
    generating = asyncio.create_task(generate())
    await asyncio.sleep(0)
    aborting = asyncio.create_task(arrivals.until_registered("g", vllm))
    await asyncio.sleep(0.02)
    assert not aborting.done()
    vllm.external_req_ids.add("g")
    await until(aborting.done, "the abort to go on")
    may_end.set()
    assert await generating == ["all"]
    vllm.external_req_ids.clear()
    await arrivals.until_registered("g", vllm)


async def test_a_request_that_vllm_refuses_holds_no_abort_up() -> None:
    arrivals = Arrivals()

    async def outputs() -> AsyncIterator[str]:
        raise ValueError("no")
        yield "never"

    with pytest.raises(ValueError, match="no"):
        [output async for output in arrivals.follow("g", outputs())]
    await arrivals.until_registered("g", OutputProcessor())
