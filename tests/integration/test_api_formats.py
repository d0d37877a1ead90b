"""MessagePack beside JSON, and compression: the same values in fewer bytes."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import httpx
import msgpack
import pytest
import zstandard

from rollout_server.api.compression import chosen_encoding
from rollout_server.api.negotiation import qualities
from shared.client import AsyncRolloutClient, WireFormat, rollout_request
from shared.errors import EngineError
from shared.msgpack_bodies import pack, unpack
from shared.schemas.base import ErrorResponse
from tests.fakes.engine import FakeEngine
from tests.fakes.http_server import serving
from tests.fakes.rollout_calls import body
from tests.fakes.service import fake_service, running, until

MSGPACK = {"accept": "application/msgpack"}
PACKED = {"content-type": "application/msgpack"}
BIG = 2**200
"""MessagePack has no integers of this size; JSON has."""


def with_big_integers(request_id: str) -> dict[str, Any]:
    request = body(request_id)
    request["prompts"][0]["metadata"] = {"big": [BIG, -BIG], "half": 0.5, "none": None}
    return request


async def test_every_answer_about_rollouts_says_the_same_in_both_notations() -> None:
    async with running(fake_service()) as client:
        request = with_big_integers("r")
        as_json = (await client.post("/v1/rollouts", json=request)).json()
        packed = await client.post("/v1/rollouts", json=request, headers=MSGPACK)
        assert packed.headers["content-type"] == "application/msgpack"
        assert unpack(packed.content) == as_json
        assert as_json["groups"][0]["metadata"]["big"] == [BIG, -BIG]
        for method in ("GET", "DELETE"):
            plain = await client.request(method, "/v1/rollouts/r")
            packed = await client.request(method, "/v1/rollouts/r", headers=MSGPACK)
            assert unpack(packed.content) == plain.json()
            assert plain.json()["result"] == as_json


async def test_a_running_request_has_no_result_in_either_notation() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    async with serving(fake_service([engine])) as url, httpx.AsyncClient(base_url=url) as client:
        posting = asyncio.create_task(client.post("/v1/rollouts", json=body("r")))
        await until(lambda: engine.num_running > 0, "the request to run")
        packed = unpack((await client.get("/v1/rollouts/r", headers=MSGPACK)).content)
        assert packed == (await client.get("/v1/rollouts/r")).json()
        engine.unblocked.set()
        await posting


async def test_a_stream_of_messagepack_has_the_lines_of_the_stream_of_json() -> None:
    async with running(fake_service()) as client:
        request = {**with_big_integers("r"), "stream": True}
        text = (await client.post("/v1/rollouts", json=request)).text
        packed = await client.post("/v1/rollouts", json=request, headers=MSGPACK)
    unpacker = msgpack.Unpacker(ext_hook=lambda _, digits: int(digits))
    unpacker.feed(packed.content)
    assert list(unpacker) == [json.loads(line) for line in text.splitlines()]


async def test_a_body_of_messagepack_is_judged_like_the_body_of_json() -> None:
    engine = FakeEngine("a")
    async with running(fake_service([engine])) as client:
        good = {**with_big_integers("r"), "sampling": {"logit_bias": {97: 1.5}, "temperature": 1}}
        answer = await client.post("/v1/rollouts", content=pack(good), headers=PACKED)
        assert answer.status_code == 200, answer.text
        assert answer.json()["groups"][0]["metadata"]["big"] == [BIG, -BIG]
        assert engine.requests[0].sampling.logit_bias == {97: 1.5}
        # As JSON it is the same request: the same id gives its result.
        again = await client.post("/v1/rollouts", json=good)
        assert again.json() == answer.json()
        for wrong, param in (({"n": "2"}, "n"), ({"n": 2.5}, "n"), ({"m": 1}, "m")):
            request = {**body("s"), **wrong}
            as_json = await client.post("/v1/rollouts", json=request)
            packed = await client.post("/v1/rollouts", content=pack(request), headers=PACKED)
            assert packed.status_code == as_json.status_code == 422
            assert packed.json() == as_json.json()
            assert packed.json()["error"]["param"] == param


BOMB = b"\xdd\x10\x00\x00\x00"
"""An array of 268 million items: 2 GB of pointers, if it is believed."""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\x81",
        pack({"n": 1}) + b"\x00",
        BOMB * 50,
        b"\x91" * 10_000 + b"\xc0",
        b"\x81\x90\x01",
        msgpack.packb(msgpack.ExtType(1, b"12x")),
        msgpack.packb(msgpack.ExtType(1, b"9" * 5000)),
        msgpack.packb(msgpack.ExtType(5, b"1")),
        msgpack.packb({"prompts": b"\xff\xfe"}),
        msgpack.packb(msgpack.Timestamp(0, 0)),
        b"\xa2\xff\xfe",
    ],
)
async def test_what_is_no_messagepack_is_a_4xx_and_costs_nothing(content: bytes) -> None:
    async with running(fake_service()) as client:
        for route in (("POST", "/v1/rollouts"), ("PUT", "/v1/engines")):
            answer = await client.request(*route, content=content, headers=PACKED)
            assert answer.status_code in (400, 422), answer.text
            ErrorResponse.model_validate_json(answer.content)


async def test_errors_are_json_whatever_was_asked_for() -> None:
    engine = FakeEngine("a", fail_with=EngineError("bad step"))
    async with running(fake_service([engine])) as client:
        answer = await client.post("/v1/rollouts", json=body(), headers=MSGPACK)
    assert answer.status_code == 500
    assert ErrorResponse.model_validate_json(answer.content).error.code == "engine_error"


async def test_the_client_and_the_server_agree_on_messagepack() -> None:
    request = rollout_request(["a", "b"], n=2, reward="length")
    async with serving(fake_service()) as url:
        answers = []
        for wire_format in (WireFormat.MSGPACK, WireFormat.JSON):
            async with AsyncRolloutClient(url, wire_format=wire_format) as client:
                answers.append(await client.rollout(request))
                assert request.request_id is not None
                answers.append(await client.result(request.request_id))
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0].groups) == 2


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("gzip, deflate", "gzip"),
        ("gzip, zstd", "zstd"),
        ("gzip;q=1, zstd;q=0.5", "gzip"),
        ("gzip;q=0", None),
        ("identity", None),
        ("*", None),
        ("gzip;q=x, br", None),
        ("", None),
    ],
)
async def test_answers_are_compressed_as_the_caller_likes(
    header: str, encoding: str | None
) -> None:
    assert chosen_encoding(header) == encoding
    service = fake_service(server={"compress_above_bytes": 100})
    async with running(service) as client:
        plain = await client.post(
            "/v1/rollouts", json=body("r"), headers={"accept-encoding": "identity"}
        )
        async with client.stream(
            "POST", "/v1/rollouts", json=body("r"), headers={"accept-encoding": header}
        ) as answer:
            content = b"".join([piece async for piece in answer.aiter_raw()])
    assert answer.headers.get("content-encoding") == encoding
    assert answer.headers["content-length"] == str(len(content))
    assert decompress(content, encoding) == plain.content
    if encoding is not None:
        assert len(content) < len(plain.content) // 2
        assert answer.headers["vary"] == "Accept-Encoding"


def decompress(content: bytes, encoding: str | None) -> bytes:
    if encoding == "gzip":
        return gzip.decompress(content)
    if encoding == "zstd":
        return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return content


async def test_small_answers_and_events_stay_as_they_are() -> None:
    async with running(fake_service()) as client:
        small = await client.get("/v1/weights")
        events = await client.post(
            "/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True}
        )
        off = fake_service(server={"compress_above_bytes": None})
    assert "content-encoding" not in small.headers
    assert "content-encoding" not in events.headers
    async with running(off) as client:
        answer = await client.post("/v1/rollouts", json={**body(), "stream": True})
        assert "content-encoding" not in answer.headers


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
async def test_a_compressed_group_arrives_while_others_still_run(encoding: str) -> None:
    slow, fast = FakeEngine("slow"), FakeEngine("fast")
    slow.unblocked.clear()
    headers = {"accept-encoding": encoding}
    request = {**body("r"), "stream": True}
    async with (
        serving(fake_service([slow, fast])) as url,
        httpx.AsyncClient(base_url=url, headers=headers) as client,
        client.stream("POST", "/v1/rollouts", json=request) as answer,
    ):
        assert answer.headers["content-encoding"] == encoding
        lines = answer.aiter_lines()
        first = json.loads(await anext(lines))
        assert slow.num_running == 2
        slow.unblocked.set()
        rest = [json.loads(line)["type"] async for line in lines]
    assert first["group"]["prompt_index"] == 1
    assert rest == ["group", "done"]


def test_wildcards_and_nonsense_choose_nothing() -> None:
    header = "application/msgpack;q=nan, application/json;v=1;q=0.3, */*"
    assert qualities(header, ("application/msgpack", "application/json")) == {
        "application/msgpack": 0.0,
        "application/json": 0.3,
    }


async def test_the_schema_names_every_format_an_answer_may_have() -> None:
    async with running(fake_service()) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]

    def formats(path: str, method: str) -> set[str]:
        return set(paths[path][method]["responses"]["200"]["content"])

    packed = {"application/json", "application/msgpack"}
    assert formats("/v1/rollouts", "post") == packed | {"application/x-ndjson"}
    assert formats("/v1/rollouts/{request_id}", "get") == packed
    assert formats("/v1/rollouts/{request_id}", "delete") == packed
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert formats(path, "post") == {"application/json", "text/event-stream"}
        assert set(paths[path]["post"]["requestBody"]["content"]) == packed
