"""Wrong requests to every route: each gets its 4xx in the one shape, and touches no engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.schemas.base import ErrorResponse
from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running

JSON = {"content-type": "application/json"}
LIMITS = {"max_n": 8, "max_prompts_per_request": 4, "max_tokens": 600, "max_pending_samples": 20}
PROMPT = {"prompt": "hi"}


def rollout(**changes: object) -> dict[str, Any]:
    return {"prompts": [PROMPT], "sampling": {"max_tokens": 8}, **changes}


def completion(**changes: object) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", **changes}


def manifest(**changes: object) -> dict[str, Any]:
    tensor = {"name": "w", "dtype": "F32", "shape": [1], "num_bytes": 4, "digest": "00"}
    return {
        "version": 1,
        "base_version": 0,
        "manifest": {"segment": "slipstream-1.safetensors", "tensors": [tensor]},
        **changes,
    }


ROLLOUTS = ("POST", "/v1/rollouts")
COMPLETIONS = ("POST", "/v1/completions")
CHAT = ("POST", "/v1/chat/completions")
WEIGHTS = ("POST", "/v1/weights")
ENGINES = ("PUT", "/v1/engines")
SPECULATION = ("PATCH", "/v1/speculation")

# (route, body, status, param, part of the message)
CASES: list[tuple[tuple[str, str], object, int, str | None, str]] = [
    (ROLLOUTS, {}, 422, "prompts", "required"),
    (ROLLOUTS, rollout(prompts=[]), 422, "prompts", "at least 1"),
    (ROLLOUTS, rollout(prompts="hi"), 422, "prompts", "'hi'"),
    (ROLLOUTS, rollout(prompts=[{}]), 422, "prompts.0", "got none"),
    (ROLLOUTS, rollout(prompts=[{"prompt": ""}]), 422, "prompts.0.prompt", "at least 1"),
    (ROLLOUTS, rollout(prompts=[{"prompt": 5}]), 422, "prompts.0.prompt", "got 5"),
    (
        ROLLOUTS,
        rollout(prompts=[PROMPT, {"prompt": "a", "prompt_token_ids": [1]}]),
        422,
        "prompts.1",
        "prompt, prompt_token_ids",
    ),
    (
        ROLLOUTS,
        rollout(prompts=[{"prompt_token_ids": []}]),
        422,
        "prompts.0.prompt_token_ids",
        "at least 1",
    ),
    (
        ROLLOUTS,
        rollout(prompts=[{"prompt_token_ids": [1, -2]}]),
        422,
        "prompts.0.prompt_token_ids.1",
        "-2",
    ),
    (
        ROLLOUTS,
        rollout(prompts=[{"prompt_token_ids": [1, 256]}]),
        400,
        "prompts.0.prompt_token_ids.1",
        "256 tokens",
    ),
    (
        ROLLOUTS,
        rollout(prompts=[{"prompt_token_ids": [1.5]}]),
        422,
        "prompts.0.prompt_token_ids.0",
        "1.5",
    ),
    (
        ROLLOUTS,
        rollout(prompts=[{"prompt_token_ids": [1] * 1017}]),
        400,
        "prompts.0.prompt_token_ids",
        "1017 tokens and max_tokens is 8: together above model.max_model_len 1024",
    ),
    (
        ROLLOUTS,
        rollout(prompts=[{"messages": [{"role": "king", "content": "x"}]}]),
        422,
        "prompts.0.messages.0.role",
        "king",
    ),
    (
        ROLLOUTS,
        rollout(prompts=[{"messages": [{"role": "tool", "content": "x"}]}]),
        400,
        "prompts.0.messages",
        "tool",
    ),
    (ROLLOUTS, rollout(prompts=[PROMPT] * 5), 413, "prompts", "5 prompts.*4"),
    (ROLLOUTS, rollout(prompts=[PROMPT] * 3, n=8), 413, "prompts", "24 samples.*20"),
    (ROLLOUTS, rollout(n=0), 422, "n", "got 0"),
    (ROLLOUTS, rollout(n="2"), 422, "n", "'2'"),
    (ROLLOUTS, rollout(n=True), 422, "n", "True"),
    (ROLLOUTS, rollout(n=9), 400, "n", "9 is above server.limits.max_n 8"),
    (ROLLOUTS, rollout(n=10**200), 400, "n", "max_n 8"),
    (ROLLOUTS, rollout(n=-(10**200)), 422, "n", "huge"),
    (ROLLOUTS, rollout(request_id="a b"), 422, "request_id", "a b"),
    (ROLLOUTS, rollout(request_id=""), 422, "request_id", "at least 1"),
    (ROLLOUTS, rollout(request_id="x" * 129), 422, "request_id", "128"),
    (ROLLOUTS, rollout(max_policy_lag=-1), 422, "max_policy_lag", "-1"),
    (ROLLOUTS, rollout(stream="yes"), 422, "stream", "yes"),
    (ROLLOUTS, rollout(reward={"name": "nope"}), 400, "reward.name", "nope"),
    (ROLLOUTS, rollout(reward={}), 422, "reward.name", "required"),
    (ROLLOUTS, rollout(surprise=1), 422, "surprise", "not permitted"),
    (ROLLOUTS, rollout(sampling={"min_q": 0.1}), 422, "sampling.min_q", "not permitted"),
    (ROLLOUTS, rollout(sampling={"min_p": 1.5}), 422, "sampling.min_p", "less than or equal to 1"),
    (ROLLOUTS, rollout(sampling={"logit_bias": {"3": 101}}), 422, "sampling.logit_bias.3", "100"),
    (ROLLOUTS, rollout(sampling={"logit_bias": {"a": 1}}), 422, "sampling.logit_bias.a", "integer"),
    (
        ROLLOUTS,
        rollout(sampling={"max_tokens": 8, "logit_bias": {"300": 1}}),
        400,
        "sampling.logit_bias.300",
        "300",
    ),
    (ROLLOUTS, rollout(sampling={"temperature": -1}), 422, "sampling.temperature", "-1"),
    (ROLLOUTS, rollout(sampling={"temperature": 101}), 422, "sampling.temperature", "100"),
    (ROLLOUTS, rollout(sampling={"top_p": 0}), 422, "sampling.top_p", "greater than 0"),
    (ROLLOUTS, rollout(sampling={"max_tokens": 0}), 422, "sampling.max_tokens", "got 0"),
    (ROLLOUTS, rollout(sampling={"max_tokens": 601}), 400, "sampling.max_tokens", "600"),
    (ROLLOUTS, rollout(sampling={"min_tokens": 9, "max_tokens": 8}), 422, "sampling", "9.*8"),
    (ROLLOUTS, rollout(sampling={"seed": 2**63}), 422, "sampling.seed", "less than"),
    (ROLLOUTS, rollout(sampling={"top_k": 2**64}), 422, "sampling.top_k", "less than"),
    (
        ROLLOUTS,
        rollout(sampling={"stop_token_ids": [2**64]}),
        422,
        "sampling.stop_token_ids.0",
        "less",
    ),
    (COMPLETIONS, completion(top_k=2**31), 422, "top_k", "less than"),
    (ROLLOUTS, rollout(sampling={"stop": [""]}), 422, "sampling.stop.0", "at least 1"),
    (
        ROLLOUTS,
        rollout(sampling={"max_tokens": 8, "stop_token_ids": [300]}),
        400,
        "sampling.stop_token_ids.0",
        "300",
    ),
    (COMPLETIONS, completion(model="other"), 404, "model", "other"),
    (COMPLETIONS, {"model": "tiny"}, 422, "prompt", "required"),
    (COMPLETIONS, completion(prompt=""), 400, "prompt", "empty"),
    (COMPLETIONS, completion(prompt=[]), 400, "prompt", "empty"),
    (COMPLETIONS, completion(prompt=["a", ""]), 400, "prompt.1", "empty"),
    (COMPLETIONS, completion(prompt=[[]]), 422, "prompt", "at least 1"),
    (COMPLETIONS, completion(prompt=[1, "a"]), 422, "prompt", "'a'"),
    (COMPLETIONS, completion(prompt={"a": 1}), 422, "prompt", "valid string .got {'a': 1}"),
    (COMPLETIONS, completion(prompt=7), 422, "prompt", "valid string .got 7"),
    (COMPLETIONS, completion(prompt=[1, 256]), 400, "prompt.1", "256 tokens"),
    (COMPLETIONS, completion(prompt=[[1], [999]]), 400, "prompt.1.0", "999"),
    (COMPLETIONS, completion(prompt=["a"] * 5), 413, "prompt", "5 prompts"),
    (COMPLETIONS, completion(prompt="x" * 1020), 400, "prompt", "1020 tokens.*16.*1024"),
    (COMPLETIONS, completion(n=9), 400, "n", "max_n 8"),
    (COMPLETIONS, completion(max_tokens=601), 400, "max_tokens", "600"),
    (COMPLETIONS, completion(stop=[""]), 400, "stop", "at least 1"),
    (COMPLETIONS, completion(stop=["x"] * 17), 400, "stop", "17 .*max_stops 16"),
    (COMPLETIONS, completion(best_of=2), 422, "best_of", "not permitted"),
    (COMPLETIONS, completion(echo=True), 422, "echo", "False"),
    (COMPLETIONS, completion(logprobs=5), 422, "logprobs", "got 5"),
    (COMPLETIONS, completion(temperature="hot"), 422, "temperature", "hot"),
    (COMPLETIONS, completion(stream_options={"x": 1}), 422, "stream_options.x", "not permitted"),
    (WEIGHTS, {}, 422, "version", "required"),
    (WEIGHTS, manifest(version=2**63), 422, "version", "less than"),
    (WEIGHTS, manifest(version=0), 422, "version", "got 0"),
    (WEIGHTS, manifest(base_version=7), 409, "base_version", "7 is not 0"),
    (WEIGHTS, manifest(transport="pigeon"), 422, "transport", "pigeon"),
    (
        WEIGHTS,
        manifest(manifest={"segment": "../x", "tensors": []}),
        422,
        "manifest.segment",
        "x",
    ),
    (ENGINES, {}, 422, "count", "required"),
    (ENGINES, {"count": -1}, 422, "count", "-1"),
    (ENGINES, {"count": 1.5}, 422, "count", "1.5"),
    (ENGINES, {"count": 99}, 400, "count", "engine.max_count"),
    (SPECULATION, {"mode": "warp"}, 422, "mode", "warp"),
    (SPECULATION, {"num_speculative_tokens": 9}, 400, "num_speculative_tokens", "9 .* 8"),
    (SPECULATION, {"num_speculative_tokens": 0}, 422, "num_speculative_tokens", "got 0"),
    (SPECULATION, {"kv_cache_threshold": 1.5}, 422, "kv_cache_threshold", "1.5"),
    (SPECULATION, {"kv_cache_hysteresis": 0.9}, 400, "kv_cache_hysteresis", "0.9.*0.5"),
    (SPECULATION, {"min_dwell": 1}, 422, "min_dwell", "not permitted"),
    (SPECULATION, {"kv_cache_threshold_tokens": 0}, 422, "kv_cache_threshold_tokens", "got 0"),
    (SPECULATION, {"min_speedup": 0.9}, 422, "min_speedup", "0.9"),
    (SPECULATION, {"switch_margin": 2}, 422, "switch_margin", "2"),
    (SPECULATION, {"exploration_fraction": 0.5}, 422, "exploration_fraction", "0.5"),
    (SPECULATION, {"per_request": "yes"}, 422, "per_request", "yes"),
    (SPECULATION, {"engine_ids": []}, 422, "engine_ids", "at least 1"),
    (SPECULATION, {"engine_ids": ["x"], "mode": "off"}, 404, "engine_ids", "no engine x"),
    (("GET", "/v1/speculation?since_step=-1"), None, 422, "since_step", "-1"),
    (("GET", "/v1/speculation?since_step=x"), None, 422, "since_step", "x"),
    (("GET", "/v1/speculation?history=-1"), None, 422, "history", "-1"),
    (("GET", "/v1/rollouts/never"), None, 404, "request_id", "never"),
    (("DELETE", "/v1/rollouts/never"), None, 404, "request_id", "never"),
    (("GET", "/v1/models/other"), None, 404, "model", "other"),
    (("GET", "/v1/nothing"), None, 404, None, "/v1/nothing"),
    (("DELETE", "/v1/weights"), None, 405, None, "DELETE"),
    (("GET", "/v1/completions"), None, 405, None, "GET"),
]
HUGE = b'{"n": 1' + b"0" * 5000 + b"}"
BODY_ROUTES = [ROLLOUTS, COMPLETIONS, CHAT, WEIGHTS, ENGINES, SPECULATION]


def limited_engine() -> tuple[FakeEngine, Any]:
    engine = FakeEngine("a")
    return engine, fake_service([engine], server={"limits": LIMITS})


@pytest.mark.parametrize(("route", "body", "status", "param", "message"), CASES)
async def test_a_wrong_request_gets_its_status_field_and_reason(
    route: tuple[str, str], body: object, status: int, param: str | None, message: str
) -> None:
    engine, service = limited_engine()
    async with running(service) as client:
        content = None if body is None else json.dumps(body)
        answer = await client.request(*route, content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    error = ErrorResponse.model_validate_json(answer.content).error
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert_matches(message, error.message)
    assert len(error.message) < 1000
    assert answer.headers["x-request-id"]
    assert engine.requests == []
    assert engine.patches == []
    assert service.router.accounts.num_accepted == 0


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(text)


@pytest.mark.parametrize("route", BODY_ROUTES)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": }', b"\xff\xfe", b"[]", b"null", b"3", b'"x"', b"[" * 10_000, HUGE],
)
async def test_what_is_not_a_json_object_is_a_400_or_422_on_every_route(
    route: tuple[str, str], content: bytes
) -> None:
    async with running(fake_service()) as client:
        answer = await client.request(*route, content=content, headers=JSON)
    is_json = content in (b"[]", b"null", b"3", b'"x"')
    assert answer.status_code == (422 if is_json else 400), answer.text
    error = ErrorResponse.model_validate_json(answer.content).error
    assert error.code == ("validation_failed" if is_json else "malformed_json")


@pytest.mark.parametrize("route", BODY_ROUTES)
async def test_a_body_that_does_not_claim_to_be_json_is_refused(route: tuple[str, str]) -> None:
    async with running(fake_service()) as client:
        answer = await client.request(*route, content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert ErrorResponse.model_validate_json(answer.content).error.code == "unsupported_media_type"


async def test_a_405_names_every_method_of_the_path() -> None:
    async with running(fake_service()) as client:
        for path, methods in (
            ("/v1/weights", "GET, POST"),
            ("/v1/engines", "GET, PUT"),
            ("/v1/rollouts/r", "DELETE, GET"),
        ):
            answer = await client.request("OPTIONS", path)
            assert (answer.status_code, answer.headers["allow"]) == (405, methods)
