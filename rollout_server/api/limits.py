"""Checks of a request against ``server.limits`` and the model, before anything is touched. Pure.

Length and token ids of prompts are checked where prompts are tokenized (``rollouts/prompts.py``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rollout_server.engine.protocol import ModelInfo
from shared.config.server import LimitsConfig
from shared.errors import InvalidRequestError, TooLargeError
from shared.schemas.base import JsonObject
from shared.schemas.chat import ChatCompletionRequest
from shared.schemas.completions import CompletionRequest
from shared.schemas.rollouts import LogitBias, RolloutRequest


def check_rollout(request: RolloutRequest, limits: LimitsConfig, model: ModelInfo) -> None:
    """Check counts and sampling of a rollout request.

    Raises:
        InvalidRequestError: a value is above its limit.
        TooLargeError: more prompts or samples than one request may have.
    """
    num_begun = request.n + request.over_provision
    if request.over_provision and num_begun > limits.max_n:
        raise InvalidRequestError(
            f"n {request.n} + over_provision {request.over_provision} is above "
            f"server.limits.max_n {limits.max_n}",
            param="over_provision",
        )
    check_counts("prompts", len(request.prompts), num_begun, limits)
    sampling = request.sampling
    check_max_tokens("sampling.max_tokens", sampling.max_tokens, limits, model)
    check_stops("sampling.stop", sampling.stop, limits)
    check_count(
        "sampling.stop_token_ids",
        len(sampling.stop_token_ids),
        "max_stop_token_ids",
        limits.max_stop_token_ids,
    )
    for position, token_id in enumerate(sampling.stop_token_ids):
        check_token("sampling.stop_token_ids", position, token_id, model)
    check_logit_bias("sampling.logit_bias", sampling.logit_bias, limits, model)
    for index, prompt in enumerate(request.prompts):
        check_object(f"prompts.{index}.metadata", prompt.metadata, limits)
    if request.reward is not None:
        check_object("reward.params", request.reward.params, limits)


def check_completion(request: CompletionRequest, limits: LimitsConfig, model: ModelInfo) -> None:
    """Check counts and sampling of a completion request.

    Raises:
        InvalidRequestError: a value is above its limit, or there is no prompt.
        TooLargeError: more prompts or samples than one request may have.
    """
    prompt = request.prompt
    one_prompt = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    num_prompts = 1 if one_prompt else len(prompt)
    if num_prompts == 0 or prompt == "":
        raise InvalidRequestError("prompt is empty", param="prompt")
    check_counts("prompt", num_prompts, request.n, limits)
    check_max_tokens("max_tokens", request.max_tokens, limits, model)
    check_stops("stop", [request.stop] if isinstance(request.stop, str) else request.stop, limits)
    check_logit_bias("logit_bias", request.logit_bias, limits, model)


def check_chat(request: ChatCompletionRequest, limits: LimitsConfig, model: ModelInfo) -> None:
    """Check counts and sampling of a chat completion request.

    Raises:
        InvalidRequestError: a value is above its limit.
        TooLargeError: more samples than one request may have.
    """
    check_counts("messages", 1, request.n, limits)
    for param in ("max_completion_tokens", "max_tokens"):
        max_tokens = getattr(request, param)
        if max_tokens is not None:
            check_max_tokens(param, max_tokens, limits, model)
    check_stops("stop", [request.stop] if isinstance(request.stop, str) else request.stop, limits)
    check_logit_bias("logit_bias", request.logit_bias, limits, model)


def check_counts(param: str, num_prompts: int, n: int, limits: LimitsConfig) -> None:
    """Check number of prompts, samples per prompt, and their product."""
    if n > limits.max_n:
        raise InvalidRequestError(f"n {n} is above server.limits.max_n {limits.max_n}", param="n")
    if num_prompts > limits.max_prompts_per_request:
        raise TooLargeError(
            f"{param} has {num_prompts} prompts, above server.limits.max_prompts_per_request "
            f"{limits.max_prompts_per_request}",
            param=param,
        )
    if num_prompts * n > limits.max_pending_samples:
        # Not an overload: it would never fit, however long the caller waited.
        raise TooLargeError(
            f"{num_prompts} prompts with n {n} make {num_prompts * n} samples, above "
            f"server.limits.max_pending_samples {limits.max_pending_samples}; split the request",
            param=param,
        )


def check_max_tokens(param: str, max_tokens: int, limits: LimitsConfig, model: ModelInfo) -> None:
    """Check the completion's length alone; with the prompt it is checked once tokenized."""
    if max_tokens > limits.max_tokens:
        raise InvalidRequestError(
            f"{param} {max_tokens} is above server.limits.max_tokens {limits.max_tokens}",
            param=param,
        )
    if max_tokens >= model.max_model_len:
        raise InvalidRequestError(
            f"{param} {max_tokens} leaves no room for a prompt in model.max_model_len "
            f"{model.max_model_len}",
            param=param,
        )


def check_stops(param: str, stops: Sequence[str] | None, limits: LimitsConfig) -> None:
    """Check number and length of stop strings: each is searched for at every token."""
    check_count(param, len(stops or ()), "max_stops", limits.max_stops)
    for position, stop in enumerate(stops or ()):
        if len(stop) > limits.max_stop_characters:
            raise InvalidRequestError(
                f"{param}[{position}] has {len(stop)} characters, above "
                f"server.limits.max_stop_characters {limits.max_stop_characters}",
                param=f"{param}.{position}",
            )


def check_count(param: str, count: int, knob: str, limit: int) -> None:
    """Check the length of a list against ``server.limits.<knob>``."""
    if count > limit:
        raise InvalidRequestError(
            f"{param} has {count} entries, above server.limits.{knob} {limit}", param=param
        )


def check_object(param: str, value: JsonObject, limits: LimitsConfig) -> None:
    """Check the size of a JSON object: it is kept with every sample's result, and sent back."""
    if not value:
        return
    num_bytes = len(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))
    if num_bytes > limits.max_metadata_bytes:
        raise InvalidRequestError(
            f"{param} has {num_bytes} bytes as JSON, above server.limits.max_metadata_bytes "
            f"{limits.max_metadata_bytes}",
            param=param,
        )


def check_logit_bias(param: str, bias: LogitBias, limits: LimitsConfig, model: ModelInfo) -> None:
    """Check the number of biased tokens, and that every one exists."""
    check_count(param, len(bias), "max_logit_biases", limits.max_logit_biases)
    for token_id in bias:
        check_token(param, token_id, token_id, model)


def check_token(param: str, key: int, token_id: int, model: ModelInfo) -> None:
    """Check that the token at ``param[key]`` exists."""
    if token_id >= model.vocab_size:
        raise InvalidRequestError(
            f"{param}[{key}] is {token_id}, outside the vocabulary of {model.vocab_size} tokens",
            param=f"{param}.{key}",
        )
