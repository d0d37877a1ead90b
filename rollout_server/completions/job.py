"""From an OpenAI completion request to checked engine requests. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from rollout_server.collaborators import Tokenizer
from rollout_server.engine.protocol import GenerateRequest, ModelInfo
from rollout_server.rollouts.prompts import check_prompt_tokens
from shared.errors import InvalidRequestError, ModelNotFoundError
from shared.schemas.completions import CompletionRequest
from shared.schemas.rollouts import SamplingOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionJob:
    """One ``/v1/completions`` call, ready to run."""

    completion_id: str
    created: int
    """Unix time in seconds."""
    request: CompletionRequest
    groups: list[GenerateRequest]  # [num_prompts]

    @property
    def num_samples(self) -> int:
        """Samples over all prompts."""
        return len(self.groups) * self.request.n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens over all prompts, each counted once."""
        return sum(len(group.prompt_token_ids) for group in self.groups)


def check_model(name: str, model: ModelInfo) -> None:
    """Accept the served model by its id or the last component of it.

    Raises:
        ModelNotFoundError: any other name.
    """
    if name not in (model.model_id, short_name(model)):
        raise ModelNotFoundError(
            f"model {name[:100]!r} is not served here; this server has {short_name(model)!r}",
            param="model",
        )


def short_name(model: ModelInfo) -> str:
    """Last path component of the model id."""
    return model.model_id.rstrip("/").rsplit("/", 1)[-1]


def prepare_job(
    request: CompletionRequest,
    *,
    completion_id: str,
    created: int,
    tokenizer: Tokenizer,
    model: ModelInfo,
) -> CompletionJob:
    """Check the model name and every prompt; tokenize text. Slow: run it in a thread.

    Raises:
        InvalidRequestError: a prompt or a sampling field is wrong.
        ModelNotFoundError: another model was asked for.
    """
    check_model(request.model, model)
    sampling = sampling_options(request)
    groups = []
    for index, (param, prompt) in enumerate(named_prompts(request)):
        token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_prompt_tokens(token_ids, model, request.max_tokens, param)
        groups.append(
            GenerateRequest(
                request_id=f"{completion_id}/group={index}",
                prompt_token_ids=token_ids,
                n=request.n,
                sampling=sampling,
                session_id=request.session_id,
            )
        )
    if not groups:
        raise InvalidRequestError("prompt is an empty list", param="prompt")
    return CompletionJob(
        completion_id=completion_id, created=created, request=request, groups=groups
    )


def named_prompts(request: CompletionRequest) -> list[tuple[str, str | Sequence[int]]]:
    """Every prompt with the name of the field it came from, whichever form was used."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    flat = [item for item in prompt if isinstance(item, int)]
    if flat:
        return [("prompt", flat)]
    texts_or_ids = [item for item in prompt if not isinstance(item, int)]
    return [(f"prompt.{index}", item) for index, item in enumerate(texts_or_ids)]


def sampling_options(request: CompletionRequest) -> SamplingOptions:
    """The engine's sampling settings.

    Raises:
        InvalidRequestError: ``stop`` has an empty string or too many of them.
    """
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    try:
        return SamplingOptions(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            max_tokens=request.max_tokens,
            stop=stop,
            ignore_eos=request.ignore_eos,
            seed=request.seed,
            repetition_penalty=request.repetition_penalty,
            logit_bias=request.logit_bias,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
        )
    except ValidationError as exc:
        # Every other field has the same limits on both sides.
        problem = exc.errors(include_url=False)[0]
        raise InvalidRequestError(f"stop: {problem['msg']}", param="stop") from exc
