"""Generates OpenAI-compatible completions through the router. Not idempotent, never kept."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from rollout_server.collaborators import Tokenizer
from rollout_server.completions.bodies import completion_response, delta_response, usage_response
from rollout_server.completions.chat import prepare_chat_job
from rollout_server.completions.job import CompletionJob, prepare_job
from rollout_server.engine.protocol import GenerateDelta, GenerateResult, ModelInfo
from rollout_server.router.router import Router
from rollout_server.tracing import span
from shared.errors import SlipstreamError, first_error
from shared.logging import log_context
from shared.schemas.chat import ChatCompletionRequest
from shared.schemas.completions import CompletionRequest, CompletionResponse

STREAM_BUFFER_DELTAS = 1024
"""Deltas held for a slow reader; above it the engine's stream is no longer read."""


class CompletionRunner:
    """Prepare, then run or stream; the samples are accounted like any others."""

    def __init__(
        self,
        *,
        router: Router,
        tokenizer: Tokenizer,
        model: ModelInfo,
        on_tokens: Callable[[int, int], None],
    ) -> None:
        self._router = router
        self._tokenizer = tokenizer
        self._model = model
        self._on_tokens = on_tokens

    async def prepare(self, request: CompletionRequest) -> CompletionJob:
        """Check and tokenize.

        Raises:
            InvalidRequestError, ModelNotFoundError: see ``prepare_job``.
        """
        return await asyncio.to_thread(
            prepare_job,
            request,
            completion_id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            tokenizer=self._tokenizer,
            model=self._model,
        )

    async def prepare_chat(
        self, request: ChatCompletionRequest, *, max_tokens_limit: int
    ) -> CompletionJob:
        """Check, render with the model's template and tokenize.

        Raises:
            InvalidRequestError, ModelNotFoundError: see ``prepare_chat_job``.
        """
        return await asyncio.to_thread(
            prepare_chat_job,
            request,
            completion_id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            tokenizer=self._tokenizer,
            model=self._model,
            max_tokens_limit=max_tokens_limit,
        )

    async def run(self, job: CompletionJob) -> CompletionResponse:
        """All choices at once. Cancelling it aborts them on their engines.

        Raises:
            OverloadedError: too many pending samples.
            SlipstreamError: the first failure of any prompt.
        """
        accounts = self._router.accounts
        accounts.accept(job.num_samples)
        error: SlipstreamError | None = None
        tasks: list[asyncio.Task[GenerateResult]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._generate(job, i)) for i in range(len(job.groups))]
        except* SlipstreamError as errors:
            error = first_error(errors)
        finally:
            results = [task.result() for task in tasks if _succeeded(task)]
            num_delivered = len(results) * job.request.n
            num_left = job.num_samples - num_delivered
            if error is None:
                accounts.settle(num_delivered=num_delivered, num_cancelled=num_left)
            else:
                accounts.settle(num_delivered=num_delivered, num_failed=num_left)
        if error is not None:
            raise error
        response = completion_response(job, results, self._tokenizer)
        assert response.usage is not None
        self._on_tokens(response.usage.prompt_tokens, response.usage.completion_tokens)
        return response

    async def stream(self, job: CompletionJob) -> AsyncGenerator[CompletionResponse, None]:
        """Chunks as they are sampled, prompts interleaved. Closing it aborts what runs.

        Raises:
            as ``run``.
        """
        self._router.accounts.accept(job.num_samples)
        queue: asyncio.Queue[_Event] = asyncio.Queue(STREAM_BUFFER_DELTAS)
        tasks = [
            asyncio.create_task(self._pump(job, index, queue)) for index in range(len(job.groups))
        ]
        offsets: dict[tuple[int, int], int] = {}
        num_finished = num_tokens = 0
        failed = False
        try:
            num_open = len(tasks)
            while num_open:
                # Bounded by the engines' own timeouts, which arrive here as errors.
                prompt_index, event = await queue.get()
                if event is None:
                    num_open -= 1
                elif isinstance(event, BaseException):
                    failed = True
                    raise event
                else:
                    key = (prompt_index, event.sample_index)
                    offset = offsets.get(key)
                    offsets[key] = (offset or 0) + len(event.text)
                    num_tokens += len(event.token_ids)
                    num_finished += event.finish_reason is not None
                    yield delta_response(job, prompt_index, event, self._tokenizer, offset)
            options = job.request.stream_options
            if options is not None and options.include_usage:
                yield usage_response(job, num_tokens)
        finally:
            num_left = job.num_samples - num_finished
            self._router.accounts.settle(
                num_delivered=num_finished,
                num_failed=num_left if failed else 0,
                num_cancelled=0 if failed else num_left,
            )
            self._on_tokens(job.num_prompt_tokens, num_tokens)
            # Last: when the client is gone, the server's cancellation strikes at this await.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate(self, job: CompletionJob, prompt_index: int) -> GenerateResult:
        group_id = job.groups[prompt_index].request_id
        with (
            log_context(request_id=job.completion_id, group_id=group_id),
            span("group", group_id=group_id, num_samples=job.request.n),
        ):
            return (await self._router.generate(job.groups[prompt_index])).result

    async def _pump(
        self, job: CompletionJob, prompt_index: int, queue: asyncio.Queue[_Event]
    ) -> None:
        group_id = job.groups[prompt_index].request_id
        try:
            with (
                log_context(request_id=job.completion_id, group_id=group_id),
                span("group", group_id=group_id, num_samples=job.request.n),
            ):
                stream = self._router.generate_stream(job.groups[prompt_index])
                async with aclosing(stream) as deltas:
                    async for delta in deltas:
                        await queue.put((prompt_index, delta))
        except Exception as exc:  # noqa: BLE001 - crosses to the reader and is raised there
            await queue.put((prompt_index, exc))
        else:
            await queue.put((prompt_index, None))


_Event = tuple[int, GenerateDelta | Exception | None]
"""Prompt index and its next delta, its error, or None at its end."""


def _succeeded(task: asyncio.Task[GenerateResult]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
