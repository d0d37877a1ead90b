"""An engine pool in memory."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.engine.protocol import ModelInfo
from shared.errors import InvalidRequestError, UnknownResourceError
from shared.pool_types import RestartState
from shared.schemas.engines import EnginePoolStatus
from shared.types import EngineState
from tests.fakes.engine import VOCAB_SIZE, FakeEngine


class FakePool:
    """Implements ``EnginePool``; tests change ``members`` at will."""

    def __init__(
        self,
        members: Sequence[FakeEngine],
        *,
        max_num_speculative_tokens: int = 8,
        max_model_len: int = 1024,
    ) -> None:
        self.members = list(members)
        self.model = ModelInfo(
            model_id="models/tiny", vocab_size=VOCAB_SIZE, max_model_len=max_model_len
        )
        self.target_count = len(self.members)
        self.max_num_speculative_tokens = max_num_speculative_tokens
        self.restart_state = RestartState.READY

    def engines(self) -> Sequence[FakeEngine]:
        return tuple(self.members)

    def drain(self, engine_id: str, *, replace: bool) -> None:
        self._find(engine_id).state = EngineState.DRAINING
        self._replace(replace)

    def remove(self, engine_id: str, *, replace: bool) -> None:
        engine = self._find(engine_id)
        engine.condemn("it was removed by request")
        self.members.remove(engine)
        self._replace(replace)

    def _find(self, engine_id: str) -> FakeEngine:
        for engine in self.members:
            if engine.engine_id == engine_id:
                return engine
        raise UnknownResourceError(f"no engine {engine_id}", param="engine_id")

    def _replace(self, replace: bool) -> None:
        if replace:
            self.members.append(FakeEngine(f"replacement-{len(self.members)}"))
        else:
            self.target_count -= 1

    def pools(self) -> Sequence[EnginePoolStatus]:
        return [
            EnginePoolStatus(
                name="default",
                target_count=self.target_count,
                max_count=4,
                num_engines=len(self.members),
                num_serving=sum(e.state is EngineState.SERVING for e in self.members),
                restart_state=self.restart_state,
                restart_in_s=0.0,
                num_losses=0,
                num_losses_in_window=0,
                loss_budget=5,
            )
        ]

    def adjust(self, count: int, pool: str) -> None:
        assert pool == "default"
        self.target_count = count

    async def scale(self, count: int, pool: str | None = None) -> None:
        if pool not in (None, "default"):
            raise InvalidRequestError(f"pool {pool} is not there", param="pool")
        self.restart_state = RestartState.READY
        if count > 4:
            raise InvalidRequestError(f"count {count} is above engine.max_count 4", param="count")
        self.target_count = count
        while len(self.members) < count:
            self.members.append(FakeEngine(f"engine-{len(self.members)}"))
