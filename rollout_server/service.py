"""The assembled rollout service: what the HTTP routes call. Launch code builds it; tests too.

Owns the router, the registry of rollouts, the status poller, the speculation policy, the metrics
and the dashboard's feed; starts and closes the scorer and closes the coordinator and the ledger.
The engine pool's life belongs to whoever made it, because engines outlive and precede the service.
"""

from __future__ import annotations

from functools import partial

from rollout_server.autoscaling.autoscaler import Autoscaler
from rollout_server.collaborators import Coordinator, Scorer, Tokenizer
from rollout_server.completions.runner import CompletionRunner
from rollout_server.dashboard.feed import DashboardFeed, FeedSources
from rollout_server.engine.protocol import EnginePool, ModelInfo
from rollout_server.engine_scrape import EngineScraper
from rollout_server.generation_control import GenerationControl
from rollout_server.health import HealthLimits
from rollout_server.health_watch import HealthWatch
from rollout_server.live_speculation import LiveSpeculation
from rollout_server.metrics import MetricSources, ServiceMetrics
from rollout_server.readiness import readiness
from rollout_server.rollouts.group_run import ExecutionParts
from rollout_server.rollouts.ledger import Ledger, NoLedger
from rollout_server.rollouts.ledger_records import Forgotten
from rollout_server.rollouts.registry import RolloutRegistry
from rollout_server.rollouts.restoring import restore_requests
from rollout_server.rollouts.result_store import ResultStore
from rollout_server.router.circuit_breaker import BreakerLimits
from rollout_server.router.router import Router
from rollout_server.router.stragglers import StragglerLimits
from rollout_server.status_poller import StatusPoller
from rollout_server.tokenizer import completion_text
from rollout_server.weight_metrics import ObservedPushes
from shared.config.run import RunConfig
from shared.schemas.engines import EnginesResponse
from shared.schemas.operations import ReadyzResponse
from shared.schemas.rollouts import RolloutGroup, RolloutRequest
from shared.schemas.speculation import SpeculationPolicy
from shared.schemas.weights import (
    AuditResponse,
    PublishRequest,
    PublishResponse,
    WeightsResponse,
)
from shared.types import DeadEnginePolicy

MIB = 1024 * 1024


class RolloutService:
    """One per server process.

    Args:
        config: the validated configuration.
        pool: the engines; they may still be starting.
        scoring: judges samples.
        coordinator: runs weight pushes over ``pool``.
        tokenizer: the served model's.
        ledger: what outlives the process; nothing does without.
    """

    def __init__(
        self,
        config: RunConfig,
        pool: EnginePool,
        scoring: Scorer,
        coordinator: Coordinator,
        tokenizer: Tokenizer,
        ledger: Ledger | None = None,
    ) -> None:
        server = config.server
        self.config = config
        self._pool = pool
        self._scoring = scoring
        self._coordinator = coordinator
        self._tokenizer = tokenizer
        self._ledger = ledger if ledger is not None else NoLedger()
        self.live_speculation = LiveSpeculation(
            pool,
            config.speculation,
            kv_capacity_tokens=lambda engine_id: self.status_poller.kv_capacity_tokens(engine_id),
        )
        room_per_engine = server.dispatch_depth * config.engine.max_num_seqs
        self.router = Router(
            pool,
            max_pending_samples=server.limits.max_pending_samples,
            max_samples_per_engine=room_per_engine,
            engine_wait_timeout_s=server.engine_wait_timeout_s,
            max_attempts=server.max_generate_attempts,
            may_continue=server.dead_engine_policy is DeadEnginePolicy.CONTINUE,
            progress_interval_s=server.progress_interval_s,
            completion_text=partial(completion_text, tokenizer),
            kv_cache_usage=lambda engine_id: self.status_poller.kv_cache_usage(engine_id),
            breaker=BreakerLimits.of(server.circuit_breaker),
            stragglers=StragglerLimits.of(server.stragglers),
            on_generated=lambda facts: self.metrics.observe_generation(facts),
        )
        self.health = HealthWatch(HealthLimits.of(config.engine))
        self.status_poller = StatusPoller(
            pool,
            interval_s=server.status_poll_s,
            timeout_s=config.engine.status_timeout_s,
            health=self.health,
            num_reserved=self.router.num_reserved,
            circuit=self.router.circuits.state,
            on_tick=self._on_tick,
            wanted_since_step=lambda engine_id: self.dashboard.wanted_since_step(engine_id),
            on_speculation=lambda report: self.dashboard.observe_speculation(report),
        )
        self.generation = GenerationControl(pool)
        self.autoscaler = Autoscaler(
            config.engine,
            pool,
            room_per_engine=room_per_engine,
            statuses=self.status_poller.statuses,
            num_queued_samples=lambda: self.router.num_queued_samples,
        )
        self._scraper = EngineScraper(pool, timeout_s=server.engine_metrics_timeout_s)
        self.metrics = ServiceMetrics(
            MetricSources(
                model_id=pool.model.model_id,
                router=self.router,
                scorer=scoring,
                committed_version=lambda: coordinator.committed_version,
                target_count=lambda: pool.target_count,
                is_draining=lambda: self.router.accounts.refusal is not None,
                pools=pool.pools,
                num_sick=lambda: self.health.num_sick,
                num_scaled=lambda: self.autoscaler.num_changes,
                statuses=self.status_poller.statuses,
                status_ages_s=self.status_poller.ages_s,
                vllm_metrics_ages_s=self._scraper.ages_s,
                speculation=self.status_poller.speculation,
                policy_of=self.live_speculation.policy_of,
                ledger=lambda: self._ledger.stats,
            )
        )
        self._pushes = ObservedPushes(coordinator, self.metrics.weights)
        coordinator.observe_audits(self.metrics.weights.observe_audit)
        self.dashboard = DashboardFeed(
            server.dashboard,
            FeedSources(
                pool=pool,
                tokenizer=tokenizer,
                statuses=self.status_poller.statuses,
                speculation=self.status_poller.speculation,
                policy=lambda: self.live_speculation.policy,
                policy_of=self.live_speculation.policy_of,
                weights=coordinator.status,
                accounts=self.router.accounts,
                num_queued_samples=lambda: self.router.num_queued_samples,
            ),
        )
        self._parts = ExecutionParts(
            router=self.router,
            scorer=scoring,
            committed_version=lambda: coordinator.committed_version,
            on_group=self._on_group,
            on_group_seconds=self.metrics.observe_group_seconds,
            ledger=self._ledger,
        )
        self.rollouts = RolloutRegistry(
            parts=self._parts,
            tokenizer=tokenizer,
            model=pool.model,
            store=ResultStore(
                ttl_s=server.result_ttl_s,
                max_bytes=server.result_store_mib * MIB,
                on_forget=lambda name: self._ledger.write(Forgotten(request_id=name)),
            ),
        )
        self.completions = CompletionRunner(
            router=self.router,
            tokenizer=tokenizer,
            model=pool.model,
            on_tokens=self.metrics.observe_tokens,
        )

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        return self._pool.model

    @property
    def speculation_policy(self) -> SpeculationPolicy:
        """What engines that join now must start with."""
        return self.live_speculation.policy

    async def start(self) -> None:
        """Start scoring, routing and polling. Engines need not be there yet."""
        await self._scoring.start()
        await self.router.start()
        await self.status_poller.start()
        await self.dashboard.start()

    async def restore(self) -> None:
        """Take up what an earlier process has left in the ledger. Engines should be there."""
        await restore_requests(self.rollouts, self._parts, self._tokenizer, self._pool.model)

    async def close(self) -> None:
        """End everything within about ``server.shutdown_timeout_s``. Idempotent."""
        await self.dashboard.close()
        await self.rollouts.close(self.config.server.shutdown_timeout_s)
        await self.router.close()
        await self.status_poller.close()
        await self._scraper.close()
        await self._coordinator.close()
        await self._pushes.close()
        await self._scoring.close()
        await self._ledger.close()

    def engines(self) -> EnginesResponse:
        """Every engine as of the last status poll."""
        return EnginesResponse(
            target_count=self._pool.target_count,
            engines=self.status_poller.statuses(),
            pause_mode=self.generation.pause_mode,
            pools=list(self._pool.pools()),
        )

    async def scale(self, count: int, pool: str | None = None) -> EnginesResponse:
        """Ask for ``count`` engines of a pool; they start and drain in the background.

        Raises:
            InvalidRequestError: no such pool, or above its ``max_count``.
        """
        await self._pool.scale(count, pool)
        self.router.wake()
        return self.engines()

    def drain(self, engine_id: str, *, replace: bool) -> EnginesResponse:
        """Take an engine out when it has finished what it has.

        Raises:
            UnknownResourceError: there is no such engine.
            ConflictError: it is starting, or in the middle of a push.
        """
        self._pool.drain(engine_id, replace=replace)
        self.router.wake()
        return self.engines()

    def remove(self, engine_id: str, *, replace: bool) -> EnginesResponse:
        """Take an engine out now; its groups are generated again elsewhere.

        Raises:
            UnknownResourceError: there is no such engine.
        """
        self._pool.remove(engine_id, replace=replace)
        self.router.wake()
        return self.engines()

    async def publish(self, request: PublishRequest) -> PublishResponse:
        """Run a weight push.

        Raises:
            ConflictError: wrong base version.
            WeightTransferError: the push was refused or an engine failed.
        """
        response = await self._pushes.publish(request)
        self.dashboard.observe_push(response)
        self.router.wake()
        return response

    async def scrape(self) -> bytes:
        """Body of ``/metrics``. Waits ``server.engine_metrics_timeout_s`` at the longest."""
        await self._scraper.refresh()
        return self.metrics.render() + self._scraper.render().encode()

    async def audit_weights(self) -> AuditResponse:
        """Compare what engines compute with, with what is committed."""
        return await self._coordinator.audit()

    def weights(self) -> WeightsResponse:
        """Committed version, per-engine versions, history."""
        return self._coordinator.status()

    def reward_names(self) -> list[str]:
        """Names a request may ask for."""
        return self._scoring.reward_names()

    def readiness(self) -> ReadyzResponse:
        """How many engines take requests.

        Raises:
            UnavailableError: none does, or the server is draining.
        """
        return readiness(self._pool, self.router.accounts.refusal)

    def _on_group(self, group: RolloutGroup, request: RolloutRequest) -> None:
        self.metrics.observe_group(group)
        self.dashboard.observe_group(group, request)

    def _on_tick(self) -> None:
        self.rollouts.sweep()
        self.autoscaler.tick()
        self.router.wake()
