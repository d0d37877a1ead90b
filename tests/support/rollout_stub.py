"""A rollout server behind a mock transport that answers each request as a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import httpx

from shared.schemas.rollouts import RolloutGroup, RolloutRequest, RolloutUsage, StreamLine
from shared.types import FinishReason
from tests.fakes.rollouts import rollout_group, rollout_sample
from trainer.rollout_client import RolloutClient

USAGE = RolloutUsage(
    num_prompt_tokens=0, num_completion_tokens=0, num_draft_tokens=0, num_accepted_tokens=0
)
URL = "http://127.0.0.1:9"
Answer = Callable[[RolloutRequest], Iterator[RolloutGroup]]


class RolloutStub:
    """What it was asked and told; groups come from ``answer``."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[RolloutRequest] = []
        self.aborted: list[str] = []
        self.errors: dict[str, tuple[int, str]] = {}
        """Status and code of every answer to a request id."""

    def client(self, stop: threading.Event, *, timeout_s: float = 20.0) -> RolloutClient:
        """A client of it whose retries end with ``stop``."""
        transport = httpx.MockTransport(self._handle)
        # Of this host, so that bodies are JSON.
        return RolloutClient(URL, timeout_s=timeout_s, transport=transport, pause=stop.wait)

    @property
    def request_ids(self) -> list[str]:
        return [str(request.request_id) for request in self.requests]

    def _handle(self, http: httpx.Request) -> httpx.Response:
        if http.method == "DELETE":
            self.aborted.append(http.url.path.removeprefix("/v1/rollouts/"))
            return httpx.Response(200, json={})
        request = RolloutRequest.model_validate_json(http.content)
        self.requests.append(request)
        error = self.errors.get(str(request.request_id))
        if error is not None:
            status, code = error
            body = {"code": code, "type": "error", "message": f"no: {code}", "param": None}
            return httpx.Response(status, json={"error": body})
        headers = {"Content-Type": "application/x-ndjson"}
        return httpx.Response(200, headers=headers, content=self._lines(request))

    def _lines(self, request: RolloutRequest) -> Iterator[bytes]:
        request_id = str(request.request_id)
        for group in self.answer(request):
            line = StreamLine(type="group", request_id=request_id, group=group)
            yield line.model_dump_json().encode() + b"\n"
        done = StreamLine(type="done", request_id=request_id, usage=USAGE)
        yield done.model_dump_json().encode() + b"\n"


def group_of(
    index: int, *, version: int = 0, aborted: bool = False, answer: str | None = None
) -> RolloutGroup:
    """Two samples, one right and one wrong."""
    reason = FinishReason.ABORT if aborted else FinishReason.STOP
    samples = [
        rollout_sample(number, reward=float(number), version=version, finish_reason=reason)
        for number in range(2)
    ]
    return rollout_group(samples=samples, prompt_index=index, answer=answer)


def groups_of(request: RolloutRequest, versions: Sequence[int]) -> Iterator[RolloutGroup]:
    """A group per prompt, the last prompt's first, of the version at the prompt's place."""
    for index in reversed(range(len(request.prompts))):
        yield group_of(index, version=versions[index], answer=request.prompts[index].answer)
