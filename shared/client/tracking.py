"""What has arrived of one request, over however many connections. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import SlipstreamError
from shared.schemas.rollouts import (
    RolloutGroup,
    RolloutRequest,
    RolloutResponse,
    RolloutUsage,
    StreamLine,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutProgress:
    """How far a request is."""

    request_id: str
    num_groups: int
    num_finished_groups: int
    num_completion_tokens: int
    """Of the finished groups."""


ProgressCallback = Callable[[RolloutProgress], object]


class RolloutTracker:
    """Gives out each prompt's group once, however often the stream begins again."""

    def __init__(self, request: RolloutRequest, on_progress: ProgressCallback | None) -> None:
        if request.request_id is None or not request.stream:
            raise ValueError("streaming needs a request with a request_id and stream true")
        self._request_id = request.request_id
        self._num_groups = len(request.prompts)
        self._on_progress = on_progress
        self._seen: set[int] = set()
        self._num_completion_tokens = 0
        self.usage: RolloutUsage | None = None
        """The server's counts, once it said done."""

    def take(self, line: StreamLine) -> RolloutGroup | None:
        """The group of a line, if it is a new one."""
        if line.type == "done":
            self.usage = line.usage
        group = line.group
        if group is None or group.prompt_index in self._seen:
            return None
        self._seen.add(group.prompt_index)
        self._num_completion_tokens += sum(len(sample.token_ids) for sample in group.samples)
        if self._on_progress is not None:
            self._on_progress(
                RolloutProgress(
                    request_id=self._request_id,
                    num_groups=self._num_groups,
                    num_finished_groups=len(self._seen),
                    num_completion_tokens=self._num_completion_tokens,
                )
            )
        return group

    def response(self, groups: list[RolloutGroup]) -> RolloutResponse:
        """The whole answer, in the order of the prompts."""
        if self.usage is None:
            raise SlipstreamError(f"rollouts {self._request_id}: the server sent no token counts")
        return RolloutResponse(
            request_id=self._request_id,
            groups=sorted(groups, key=lambda group: group.prompt_index),
            usage=self.usage,
        )
