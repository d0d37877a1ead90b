"""Limits of a request: at the limit it is served, above it the answer names value and knob."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.schemas.base import ErrorResponse
from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running

LIMITS = {
    "max_n": 8,
    "max_prompts_per_request": 4,
    "max_tokens": 600,
    "max_stops": 2,
    "max_stop_characters": 5,
    "max_stop_token_ids": 3,
    "max_logit_biases": 2,
    "max_metadata_bytes": 20,
}
BIAS = {"1": 1, "2": 1}


def rollout(**changes: object) -> dict[str, Any]:
    return {"prompts": [{"prompt": "hi"}], **changes}


def sampling(**changes: object) -> dict[str, Any]:
    return rollout(sampling={"max_tokens": 8, **changes})


def metadata(value: object) -> dict[str, Any]:
    return rollout(prompts=[{"prompt": "a"}, {"prompt": "b", "metadata": {"k": value}}])


def completion(**changes: object) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", **changes}


# (body at the limit, body above it, param, value, knob)
CASES: list[tuple[dict[str, Any], dict[str, Any], str, int, str]] = [
    (rollout(n=8), rollout(n=9), "n", 9, "max_n 8"),
    (sampling(max_tokens=600), sampling(max_tokens=601), "sampling.max_tokens", 601,
     "max_tokens 600"),
    (rollout(prompts=[{"prompt": "a"}] * 4), rollout(prompts=[{"prompt": "a"}] * 5), "prompts", 5,
     "max_prompts_per_request 4"),
    (sampling(stop=["a", "b"]), sampling(stop=["a", "b", "c"]), "sampling.stop", 3, "max_stops 2"),
    (sampling(stop=["a", "12345"]), sampling(stop=["a", "123456"]), "sampling.stop.1", 6,
     "max_stop_characters 5"),
    (sampling(stop_token_ids=[1, 2, 3]), sampling(stop_token_ids=[1, 2, 3, 4]),
     "sampling.stop_token_ids", 4, "max_stop_token_ids 3"),
    (sampling(logit_bias=BIAS), sampling(logit_bias=BIAS | {"3": 1}), "sampling.logit_bias", 3,
     "max_logit_biases 2"),
    (metadata("x" * 11), metadata("x" * 12), "prompts.1.metadata", 20 + 1, "max_metadata_bytes 20"),
    (metadata("é" * 5), metadata("é" * 6), "prompts.1.metadata", 21, "max_metadata_bytes 20"),
    (rollout(reward={"name": "length", "params": {"k": "x" * 11}}),
     rollout(reward={"name": "length", "params": {"k": "x" * 12}}),
     "reward.params", 21, "max_metadata_bytes 20"),
    (completion(stop="12345"), completion(stop="123456"), "stop.0", 6, "max_stop_characters 5"),
    (completion(stop=["a", "b"]), completion(stop=["a", "b", "c"]), "stop", 3, "max_stops 2"),
    (completion(logit_bias=BIAS), completion(logit_bias=BIAS | {"3": 1}), "logit_bias", 3,
     "max_logit_biases 2"),
    (completion(n=8), completion(n=9), "n", 9, "max_n 8"),
]  # fmt: skip


@pytest.mark.parametrize(("fits", "above", "param", "value", "knob"), CASES)
async def test_a_limit_holds_from_the_next_value_on(
    fits: dict[str, Any], above: dict[str, Any], param: str, value: int, knob: str
) -> None:
    engine = FakeEngine("a")
    path = "/v1/completions" if "model" in fits else "/v1/rollouts"
    async with running(fake_service([engine], server={"limits": LIMITS})) as client:
        answer = await client.post(path, json=above)
        assert answer.status_code in (400, 413)
        assert engine.requests == []
        error = ErrorResponse.model_validate_json(answer.content).error
        assert error.param == param
        assert str(value) in error.message
        assert f"server.limits.{knob}" in error.message
        accepted = await client.post(path, json=fits)
        assert accepted.status_code == 200, accepted.text


@pytest.mark.parametrize("text", ['"\\ud800"', "1e400", "NaN", "1" + "0" * 4000, '{"a": [[]]}'])
async def test_whatever_stands_in_metadata_can_be_measured(text: str) -> None:
    body = f'{{"prompts": [{{"prompt": "a", "metadata": {{"k": {text}}}}}]}}'
    async with running(fake_service()) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/rollouts", content=body.encode(), headers=headers)
    assert answer.status_code < 500, answer.text
    json.loads(answer.content)
