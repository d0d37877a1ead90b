"""What the service asks of the parts it is put together from, besides the engine pool.

``scoring/pool.py`` and ``weights/coordinator.py`` implement these; ``tests/fakes`` does in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rollout_server.scoring.types import ScoreJob, ScoreOutcome
from shared.schemas.rollouts import ChatMessage, RewardSpec
from shared.schemas.weights import AuditResponse, PublishRequest, PublishResponse, WeightsResponse


class Scorer(Protocol):
    """Judges finished samples in worker processes."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    @property
    def num_queued(self) -> int: ...

    @property
    def num_worker_restarts(self) -> int: ...

    def reward_names(self) -> list[str]: ...

    def validate_reward(self, spec: RewardSpec) -> None:
        """Check name and parameters before anything is generated.

        Raises:
            InvalidRequestError: unknown reward or wrong parameters.
        """
        ...

    async def score_group(self, jobs: Sequence[ScoreJob]) -> Sequence[ScoreOutcome]:
        """In the order of the jobs. A failing reward function is the status of its sample; a
        ``ScoringError`` stands where the pool itself failed."""
        ...


class Coordinator(Protocol):
    """Runs weight pushes over all engines and remembers what is committed."""

    @property
    def committed_version(self) -> int: ...

    async def publish(self, request: PublishRequest) -> PublishResponse: ...

    async def audit(self) -> AuditResponse: ...

    def observe_audits(self, observer: Callable[[AuditResponse], None]) -> None:
        """Tell ``observer`` of every audit, also of those nobody asked for."""
        ...

    def status(self) -> WeightsResponse: ...

    async def close(self) -> None: ...


class Tokenizer(Protocol):
    """Text to token ids and back, with the model's own rules. Called from worker threads."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation up to where the assistant's turn begins.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses these messages.
        """
        ...
