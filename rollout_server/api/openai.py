"""OpenAI-compatible ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from rollout_server.api.access import needs
from rollout_server.api.bodies import body_of, json_response, read_body
from rollout_server.api.connection import while_connected
from rollout_server.api.dependencies import Service
from rollout_server.api.errors import error_body
from rollout_server.api.limits import check_chat, check_completion
from rollout_server.api.noted_errors import note_error
from rollout_server.completions.chat import ChatChunks, chat_response
from rollout_server.completions.job import check_model, short_name
from shared.errors import SlipstreamError
from shared.schemas.base import ErrorResponse
from shared.schemas.chat import ChatCompletionRequest, ChatCompletionResponse
from shared.schemas.completions import (
    CompletionRequest,
    CompletionResponse,
    ModelCard,
    ModelList,
)
from shared.types import ApiScope

router = APIRouter(tags=["openai"], dependencies=needs(ApiScope.ROLLOUT))

STARTED = int(time.time())
EVENTS: dict[str, object] = {"text/event-stream": {}}
"""For OpenAPI: what ``stream`` answers with."""


@router.get("/v1/models")
async def list_models(service: Service) -> ModelList:
    """The one served model."""
    return ModelList(data=[_card(service)])


@router.get("/v1/models/{model:path}")
async def get_model(model: str, service: Service) -> ModelCard:
    """The served model, by its id or the last component of it."""
    check_model(model, service.model)
    return _card(service)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": CompletionResponse, "content": EVENTS}},
    openapi_extra=body_of(CompletionRequest),
)
async def post_completions(request: Request, service: Service) -> Response:
    """Complete text or token ids. When the client goes away, so does the work."""
    body = await read_body(request, CompletionRequest)
    check_completion(body, service.config.server.limits, service.model)
    job = await service.completions.prepare(body)
    if not body.stream:
        return json_response(await while_connected(request, service.completions.run(job)))
    return await _stream(request, service.completions.stream(job), lambda chunk: chunk)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": ChatCompletionResponse, "content": EVENTS}},
    openapi_extra=body_of(ChatCompletionRequest),
)
async def post_chat_completions(request: Request, service: Service) -> Response:
    """Answer a conversation, rendered with the model's own chat template."""
    body = await read_body(request, ChatCompletionRequest)
    limits = service.config.server.limits
    check_chat(body, limits, service.model)
    job = await service.completions.prepare_chat(body, max_tokens_limit=limits.max_tokens)
    if not body.stream:
        completion = await while_connected(request, service.completions.run(job))
        return json_response(chat_response(completion))
    return await _stream(request, service.completions.stream(job), ChatChunks().chunk)


async def _stream(
    request: Request,
    chunks: AsyncGenerator[CompletionResponse, None],
    translate: Callable[[CompletionResponse], BaseModel],
) -> Response:
    # The first chunk is awaited here: what fails before it still gets a status of its own.
    first = await while_connected(request, anext(chunks))
    return StreamingResponse(_events(first, chunks, translate), media_type="text/event-stream")


async def _events(
    first: CompletionResponse,
    chunks: AsyncGenerator[CompletionResponse, None],
    translate: Callable[[CompletionResponse], BaseModel],
) -> AsyncIterator[bytes]:
    async with aclosing(chunks):
        yield _event(translate(first))
        try:
            async for chunk in chunks:
                yield _event(translate(chunk))
        except SlipstreamError as exc:
            # The status is out; OpenAI's clients raise on an event with an error.
            note_error(exc.code)
            error = ErrorResponse(error=error_body(exc)).model_dump_json()
            yield b"data: %b\n\n" % error.encode()
            return
        yield b"data: [DONE]\n\n"


def _event(chunk: BaseModel) -> bytes:
    return b"data: %b\n\n" % chunk.model_dump_json().encode()


def _card(service: Service) -> ModelCard:
    return ModelCard(
        id=short_name(service.model), created=STARTED, max_model_len=service.model.max_model_len
    )
