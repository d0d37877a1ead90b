"""Random bodies and paths: whatever comes in, nothing answers with a 5xx."""

from __future__ import annotations

import asyncio
import json

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.msgpack_bodies import pack
from shared.schemas.base import ErrorResponse
from tests.fakes.service import fake_service, running
from tests.integration.test_api_bad_input import BODY_ROUTES, JSON, completion, rollout

MSGPACK = {"content-type": "application/msgpack"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = (
    "prompts prompt n model sampling reward request_id stream count mode version base_version "
    "manifest max_tokens stop num_speculative_tokens"
)
field_names = st.sampled_from(FIELDS.split())
bodies = st.one_of(
    st.binary(max_size=60),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(field_names, json_values).map(lambda value: json.dumps(value).encode()),
    st.dictionaries(field_names, json_values).map(
        lambda value: json.dumps({**completion(), **value}).encode()
    ),
    st.dictionaries(field_names, json_values).map(
        lambda value: json.dumps({**rollout(), **value}).encode()
    ),
    st.dictionaries(field_names, json_values).map(lambda value: pack({**rollout(), **value})),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(BODY_ROUTES), bodies), min_size=10, max_size=15))
def test_no_body_whatever_makes_the_server_fail(
    requests: list[tuple[tuple[str, str], bytes]],
) -> None:
    async def send_all() -> None:
        async with running(fake_service()) as client:
            for route, content in requests:
                for headers in (JSON, MSGPACK):
                    answer = await client.request(*route, content=content, headers=headers)
                    assert answer.status_code < 500, (route, content, answer.text)
                    if answer.status_code >= 400:
                        ErrorResponse.model_validate_json(answer.content)

    asyncio.run(send_all())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_no_path_whatever_makes_the_server_fail(names: list[str]) -> None:
    async def send_all() -> None:
        async with running(fake_service()) as client:
            for name in names:
                for prefix in ("/v1/rollouts/", "/v1/models/", "/"):
                    path = prefix + name.replace("?", "").replace("#", "")
                    try:
                        answer = await client.get(path)
                    except (UnicodeError, ValueError, httpx.InvalidURL):
                        continue  # the client itself refuses such a URL
                    assert answer.status_code in (200, 404, 405), (path, answer.text)

    asyncio.run(send_all())
