"""MessagePack beside JSON: which one a caller wants, and from the one to the other.

Results are kept as JSON, encoded once when a group finishes; MessagePack is made from it for those
who ask. Either way the values are the same, and the rules for bodies are those of JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request, Response
from pydantic_core import from_json, to_json

from rollout_server.api.negotiation import qualities
from rollout_server.rollouts.execution import RolloutExecution
from shared.msgpack_bodies import array_head, map_head, pack, unpack

JSON_TYPE = "application/json"
MSGPACK_TYPE = "application/msgpack"
MAX_CONTAINERS = 1 << 18
"""Maps and arrays of a request: beyond any that the limits accept, and some 20 MiB of memory."""
MSGPACK_CONTENT: dict[str, object] = {MSGPACK_TYPE: {}}
"""For OpenAPI: the same values; JSON Schema cannot describe another notation."""


def wants_msgpack(request: Request) -> bool:
    """Whether ``Accept`` names MessagePack and likes nothing better."""
    liked = qualities(request.headers.get("accept", ""), (MSGPACK_TYPE, JSON_TYPE))
    return 0.0 < liked[MSGPACK_TYPE] >= liked[JSON_TYPE]


def json_of_msgpack(body: bytes) -> bytes:
    """A request's body as the JSON it stands for, so that both are judged by the same rules.

    Raises:
        ValueError: not one MessagePack value, or one that JSON cannot say.
    """
    return to_json(unpack(body, MAX_CONTAINERS), inf_nan_mode="constants", bytes_mode="hex")


def msgpack_of_json(body: bytes) -> bytes:
    """JSON of ours as MessagePack."""
    return pack(from_json(body))


async def msgpack_lines(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream of JSON lines as values one after the other."""
    async for line in lines:
        yield msgpack_of_json(line)


async def msgpack_result(execution: RolloutExecution) -> bytes:
    """``RolloutResponse`` of a finished execution."""
    parts = [
        map_head(3),
        pack("request_id"),
        pack(execution.request_id),
        pack("usage"),
        msgpack_of_json(execution.usage.model_dump_json().encode()),
        pack("groups"),
        array_head(execution.num_groups),
    ]
    for group in execution.ordered_groups():
        parts.append(msgpack_of_json(group))
        await asyncio.sleep(0)  # milliseconds for a large group: others get their turn in between
    return b"".join(parts)


def msgpack_with(body: bytes, name: str, packed: bytes | None) -> bytes:
    """A JSON object of ours as MessagePack, with one more field that is packed already."""
    fields = from_json(body)
    if packed is None:
        return pack(fields)
    pairs = b"".join(pack(key) + pack(value) for key, value in fields.items())
    return map_head(len(fields) + 1) + pairs + pack(name) + packed


def msgpack_response(body: bytes) -> Response:
    """200 with a MessagePack body."""
    return Response(body, media_type=MSGPACK_TYPE)
