"""Watches the service at a fixed interval and tells listeners: once everything, then what is new.

Called by the service (groups, pushes, engines' decisions) and by ``api/dashboard.py`` (listeners).
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version as distribution_version
from typing import Any

from rollout_server.collaborators import Tokenizer
from rollout_server.dashboard.engine_watch import EngineWatch
from rollout_server.dashboard.listeners import Listener, Listeners
from rollout_server.dashboard.pushes import PushWatch
from rollout_server.dashboard.recent_groups import RecentGroups
from rollout_server.engine.protocol import EnginePool
from rollout_server.router.accounting import SampleAccounts
from rollout_server.status_poller import NO_HISTORY_STEP
from shared.config.server import DashboardConfig
from shared.schemas.dashboard import (
    EngineRow,
    FeedEvent,
    GroupTokens,
    KvPoint,
    LoadPoint,
    SampleCounts,
    ServerFacts,
)
from shared.schemas.engines import EngineStatus
from shared.schemas.rollouts import RolloutGroup, RolloutRequest
from shared.schemas.speculation import EngineSpeculation, SpeculationPolicy
from shared.schemas.weights import PublishResponse, WeightsResponse

MAX_LOAD_POINTS = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedSources:
    """What is read at every tick; nothing of it waits for an engine."""

    pool: EnginePool
    tokenizer: Tokenizer
    statuses: Callable[[], Sequence[EngineStatus]]
    speculation: Callable[[], Sequence[EngineSpeculation]]
    policy: Callable[[], SpeculationPolicy]
    policy_of: Callable[[str], SpeculationPolicy]
    weights: Callable[[], WeightsResponse]
    accounts: SampleAccounts
    num_queued_samples: Callable[[], int]


class DashboardFeed:
    """One per server."""

    def __init__(self, config: DashboardConfig, sources: FeedSources) -> None:
        self._config = config
        self._sources = sources
        self._facts = ServerFacts(
            boot_id=uuid.uuid4().hex,
            started_s=time.time(),
            version=distribution_version("slipstream-rollout"),
            model=sources.pool.model.model_id,
            interval_s=config.interval_s,
        )
        self._listeners = Listeners(config.max_listeners)
        self._groups = RecentGroups()
        self._engines = EngineWatch()
        self._pushes = PushWatch()
        self._load: deque[LoadPoint] = deque(maxlen=MAX_LOAD_POINTS)
        self._ticker: asyncio.Task[None] | None = None

    @property
    def num_listeners(self) -> int:
        """Open streams."""
        return len(self._listeners)

    async def start(self) -> None:
        """Start watching."""
        self._ticker = asyncio.create_task(self._run(), name="dashboard-feed")

    async def close(self) -> None:
        """Stop, and end every listener's stream. Idempotent."""
        ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.cancel()
            with suppress(asyncio.CancelledError):
                await ticker
        self._listeners.close(_farewell("the server is shutting down"))

    def observe_group(self, group: RolloutGroup, request: RolloutRequest) -> None:
        """One delivered group."""
        is_greedy = request.sampling.temperature == 0.0
        self._groups.observe(time.time(), group, is_greedy=is_greedy)

    def observe_push(self, response: PublishResponse) -> None:
        """One committed push."""
        self._pushes.observe(response)

    def wanted_since_step(self, engine_id: str) -> int:
        """After which step the engine's decisions are wanted: none while nobody listens."""
        if not len(self._listeners):
            return NO_HISTORY_STEP
        return self._engines.last_step(engine_id)

    def observe_speculation(self, report: EngineSpeculation) -> None:
        """An engine's report with the decisions that were wanted."""
        if report.history:
            self._engines.add_decisions(report)

    def subscribe(self) -> Listener:
        """A new listener, whose first event is everything there is.

        Raises:
            OverloadedError: there are ``server.dashboard.max_listeners`` already.
            UnavailableError: the server is shutting down.
        """
        self._listeners.check_room()
        return self._listeners.add(_encode("snapshot", self._snapshot()))

    async def events(self, listener: Listener) -> AsyncIterator[bytes]:
        """The listener's events; ends with the server, or when it cannot keep up."""
        try:
            async for event in listener.events():
                yield event
        finally:
            self._listeners.remove(listener)

    async def group_tokens(self, number: int) -> GroupTokens:
        """One of the recent groups, token by token.

        Raises:
            UnknownResourceError: it is not kept any more.
        """
        return await asyncio.to_thread(self._groups.tokens, number, self._sources.tokenizer.decode)

    async def _run(self) -> None:
        while True:
            event = self._update()
            if len(self._listeners):
                self._listeners.send(
                    _encode("update", event), _farewell("this listener is too slow")
                )
            await asyncio.sleep(self._config.interval_s)

    def _update(self) -> FeedEvent:
        """Look at everything once; what is new of it."""
        now_s = round(time.time(), 3)
        statuses = self._sources.statuses()
        lengths = {
            report.engine_id: report.num_speculative_tokens
            for report in self._sources.speculation()
        }
        points = self._engines.tick(now_s, statuses, lengths)
        load: LoadPoint = (
            now_s,
            round(sum(self._engines.tokens_per_s(status.engine_id) for status in statuses), 2),
            sum(status.num_running_reqs for status in statuses),
            sum(status.num_waiting_reqs for status in statuses)
            + self._sources.num_queued_samples(),
        )
        self._load.append(load)
        weights = self._sources.weights()
        groups = self._groups.tick()
        rewards = self._groups.rewards() if self._groups.take_rewards_changed() else None
        return self._event(
            now_s,
            statuses,
            points,
            weights,
            departed=self._engines.look_for_departed(now_s, self._sources.pool.engines()),
            load=[load],
            commits=self._pushes.look_for_commit(now_s, weights.committed_version),
            pushes=self._pushes.new_rows(weights),
            rewards=rewards,
            groups=groups,
        )

    def _snapshot(self) -> FeedEvent:
        """Everything up to the last tick: the next update goes on from there."""
        statuses = self._sources.statuses()
        weights = self._sources.weights()
        return self._event(
            round(time.time(), 3),
            statuses,
            {status.engine_id: self._engines.points(status.engine_id) for status in statuses},
            weights,
            server=self._facts,
            departed=self._engines.departed,
            load=list(self._load),
            commits=self._pushes.commits,
            pushes=self._pushes.rows(weights),
            rewards=self._groups.rewards(),
            groups=self._groups.groups,
        )

    def _event(
        self,
        now_s: float,
        statuses: Sequence[EngineStatus],
        points: Mapping[str, list[KvPoint]],
        weights: WeightsResponse,
        **histories: Any,
    ) -> FeedEvent:
        sources = self._sources
        reports = {report.engine_id: report for report in sources.speculation()}
        policy = sources.policy()
        accounts = sources.accounts
        return FeedEvent(
            time_s=now_s,
            target_count=sources.pool.target_count,
            engines=[
                EngineRow(
                    status=status,
                    speculation=reports.get(status.engine_id),
                    policy=(own := sources.policy_of(status.engine_id)),
                    has_own_policy=own != policy,
                    tokens_per_s=self._engines.tokens_per_s(status.engine_id),
                    kv_points=points[status.engine_id],
                )
                for status in statuses
            ],
            policy=policy,
            max_num_speculative_tokens=sources.pool.max_num_speculative_tokens,
            samples=SampleCounts(
                num_pending=accounts.num_pending,
                num_queued=sources.num_queued_samples(),
                num_delivered=accounts.num_delivered,
                num_failed=accounts.num_failed,
                num_cancelled=accounts.num_cancelled,
            ),
            committed_version=weights.committed_version,
            push=weights.push,
            **histories,
        )


def _encode(event: str, data: FeedEvent) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data.model_dump_json().encode())


def _farewell(reason: str) -> bytes:
    return b"event: end\ndata: %b\n\n" % json.dumps({"reason": reason}).encode()
