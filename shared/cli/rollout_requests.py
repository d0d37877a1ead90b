"""One request of ``slipstream rollout``, taken up where it broke."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence

from shared.cli.api_client import ApiClient
from shared.cli.rollout_prompts import NumberedPrompt, RolloutSettings
from shared.errors import RequestError, SlipstreamError, UnavailableError, UnknownResourceError
from shared.schemas.rollouts import RolloutGroup, RolloutRequest, RolloutStatusResponse
from shared.types import FinishReason, RolloutRunState

MIN_RETRY_WAIT_S = 0.1
MAX_RETRY_WAIT_S = 30.0

_PROMPT_AT_FAULT = re.compile(r"prompts\.(\d+)\b")


def sample_chunk(
    client: ApiClient, chunk: Sequence[NumberedPrompt], settings: RolloutSettings, retries: int
) -> Generator[tuple[str, RolloutGroup], None, None]:
    """Yield a result per prompt as they finish.

    After a lost connection the request is looked for on the server: it goes on there, and only if
    it is gone is what is missing asked for anew. Whoever leaves early ends it on the server.

    Raises:
        RequestError: it was refused; names the line of a prompt that is at fault.
        UnavailableError: the server stayed away, or samples were aborted there, for ``retries``
            tries in a row.
    """
    missing = {prompt.prompt_id: prompt for prompt in chunk}
    asked: list[NumberedPrompt] = []
    request: RolloutRequest | None = None
    num_failures = 0
    try:
        while missing:
            try:
                groups = None if request is None else groups_of(client, request)
                if request is None or groups is None:
                    asked = list(missing.values())
                    request = new_request(asked, settings)
                    groups = streamed_groups(client, request)
                for group in groups:
                    prompt_id = asked[group.prompt_index].prompt_id
                    if prompt_id in missing and is_whole(group):
                        del missing[prompt_id]
                        num_failures = 0
                        yield prompt_id, group
                request = None
                if missing:
                    raise UnavailableError(f"{len(missing)} prompts were aborted on the server")
            except UnavailableError as exc:
                num_failures += 1
                if num_failures > retries:
                    raise
                time.sleep(retry_wait_s(num_failures, exc.retry_after_s))
            except RequestError as exc:
                request = None  # nothing of it is there
                raise at_its_line(exc, asked) from exc
    finally:
        if missing and request is not None:
            # For nobody any more. A server that is away has nothing to end.
            with contextlib.suppress(SlipstreamError):
                client.abort_rollouts(request)


def new_request(prompts: Sequence[NumberedPrompt], settings: RolloutSettings) -> RolloutRequest:
    """A request under an id of its own."""
    return RolloutRequest(
        request_id=f"cli-{uuid.uuid4().hex}",
        prompts=[prompt.item for prompt in prompts],
        n=settings.n,
        sampling=settings.sampling,
        reward=settings.reward,
        stream=True,
    )


def groups_of(client: ApiClient, request: RolloutRequest) -> Iterable[RolloutGroup] | None:
    """Groups of a request that was sent before; None when the server has nothing of it."""
    try:
        status = client.get(f"/v1/rollouts/{request.request_id}", RolloutStatusResponse)
    except UnknownResourceError:
        return None
    if status.result is not None:
        return status.result.groups
    # The same request again attaches to the one that runs.
    return streamed_groups(client, request) if status.state is RolloutRunState.RUNNING else None


def streamed_groups(client: ApiClient, request: RolloutRequest) -> Iterator[RolloutGroup]:
    """Groups as they finish."""
    for line in client.stream_rollouts(request):
        if line.group is not None:
            yield line.group


def is_whole(group: RolloutGroup) -> bool:
    """Whether every sample came to its own end."""
    return all(sample.finish_reason is not FinishReason.ABORT for sample in group.samples)


def retry_wait_s(num_failures: int, retry_after_s: float | None) -> float:
    """Doubles with every failure."""
    first_s = 1.0 if retry_after_s is None else max(MIN_RETRY_WAIT_S, retry_after_s)
    return min(MAX_RETRY_WAIT_S, first_s * 2.0 ** min(num_failures - 1, 10))


def at_its_line(error: RequestError, asked: Sequence[NumberedPrompt]) -> RequestError:
    """A refusal of one prompt, with its line in the file."""
    match = _PROMPT_AT_FAULT.match(error.param or "")
    if match is None or int(match[1]) >= len(asked):
        return error
    number = asked[int(match[1])].line_number
    return type(error)(f"line {number} of the prompts: {error.message}", error.param)
