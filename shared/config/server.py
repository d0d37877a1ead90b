"""The HTTP service, scoring and the Ray cluster underneath."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from shared.config.base import SettingsModel
from shared.config.routing import CircuitBreakerConfig, StragglersConfig
from shared.types import DeadEnginePolicy, NetworkAccess


class LimitsConfig(SettingsModel):
    """Upper limits on what a request may ask for; above them the answer is a 4xx."""

    max_body_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Of a request, counted while it streams in."""
    max_prompts_per_request: int = Field(default=4096, ge=1)
    """Prompts of one request."""
    max_n: int = Field(default=256, ge=1)
    """Samples per prompt."""
    max_tokens: int = Field(default=131072, ge=1)
    """Tokens of one completion."""
    max_stops: int = Field(default=16, ge=0)
    """Stop strings of a request."""
    max_stop_characters: int = Field(default=1024, ge=1)
    """Of one stop string."""
    max_stop_token_ids: int = Field(default=64, ge=0, le=128)
    """vLLM's GPU sampler has room for 128."""
    max_logit_biases: int = Field(default=1024, ge=0, le=1024)
    """vLLM's GPU sampler has room for 1024."""
    max_metadata_bytes: int = Field(default=1024 * 1024, ge=2)
    """Of one prompt's ``metadata``, and of ``reward.params``, as JSON."""
    max_pending_samples: int = Field(default=16384, ge=1)
    """Samples accepted and not delivered; above it new requests answer 429."""


class DashboardConfig(SettingsModel):
    """The page at ``/dashboard`` and the events it lives from."""

    interval_s: float = Field(default=1.0, gt=0)
    """Between two events, however much happens."""
    max_listeners: int = Field(default=16, ge=1)
    """Open streams of ``GET /v1/events``; above it the answer is 429."""


class ServerConfig(SettingsModel):
    """Where the API listens and how it behaves."""

    host: str = "127.0.0.1"
    """An address other machines can reach needs API keys, or ``allow_unauthenticated``."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 picks a free port."""
    api_keys_file: str | None = None
    """``NAME SCOPES KEY`` lines, readable by the owner only; see ``docs/security.md``. With it, or
    with ``SLIPSTREAM_API_KEYS``, every route but ``/livez``, ``/readyz`` and the dashboard's
    page asks for a key."""
    allow_unauthenticated: bool = False
    """Serve other machines without API keys: whoever reaches the port can replace the weights."""
    tls_certificate_file: str | None = None
    """PEM, with the chain. With it and ``tls_key_file`` the server speaks HTTPS only."""
    tls_key_file: str | None = None
    """PEM, without a passphrase."""
    limits: LimitsConfig = LimitsConfig()
    compress_above_bytes: int | None = Field(default=64 * 1024, ge=0)
    """Answers of this size are compressed for callers that accept zstd or gzip, and so are streams
    of groups; null compresses nothing."""
    dashboard: DashboardConfig = DashboardConfig()
    result_ttl_s: float = Field(default=600.0, gt=0)
    """How long a finished request's result can be fetched again."""
    result_store_mib: int = Field(default=512, ge=1)
    """Upper limit of memory for kept results; the oldest go first."""
    drain_timeout_s: float = Field(default=120.0, ge=0)
    """How long a server that got SIGTERM lets accepted requests finish while it refuses new ones
    with 503; ``slipstream run`` does not wait. Whoever kills it after a while must leave it this
    time and ``shutdown_timeout_s`` together."""
    ledger: bool = True
    """Record accepted requests and finished groups in ``<run_dir>/rollouts.sqlite3``, so that they
    survive a restart of the server, a kill included; kept as long as the two settings above say."""
    shutdown_timeout_s: float = Field(default=30.0, gt=0)
    """How long running requests may go on when the server is stopped."""
    status_poll_s: float = Field(default=0.5, gt=0)
    """How often engine load is read for routing and metrics."""
    engine_metrics_timeout_s: float = Field(default=1.0, gt=0)
    """How long ``/metrics`` waits for vLLM's metrics; a late engine shows its last ones."""
    engine_wait_timeout_s: float = Field(default=300.0, gt=0)
    """How long requests wait for an engine while none can take them; afterwards they answer 503."""
    max_generate_attempts: int = Field(default=3, ge=1)
    """Engines a group is tried on when engines die under it."""
    dead_engine_policy: DeadEnginePolicy = DeadEnginePolicy.CONTINUE
    """What becomes of the unfinished samples of an engine that dies."""
    circuit_breaker: CircuitBreakerConfig = CircuitBreakerConfig()
    stragglers: StragglersConfig = StragglersConfig()
    progress_interval_s: float = Field(default=1.0, gt=0)
    """How often engines are asked what they have sampled; more than that is not lost with one."""
    dispatch_depth: int = Field(default=2, ge=1)
    """Samples handed to one engine at once, in multiples of ``engine.max_num_seqs``; the rest waits
    in the router, where an engine that joins later can still get it."""

    @property
    def url_scheme(self) -> str:
        """How the server is spoken to."""
        return "http" if self.tls_certificate_file is None else "https"

    @model_validator(mode="after")
    def certificate_and_key_come_together(self) -> Self:
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            missing = "tls_key_file" if self.tls_key_file is None else "tls_certificate_file"
            raise ValueError(
                "tls_certificate_file and tls_key_file are needed together; "
                f"server.{missing} is not set"
            )
        return self

    @model_validator(mode="after")
    def late_samples_can_go_on_elsewhere(self) -> Self:
        policy = self.dead_engine_policy
        if self.stragglers.enabled and policy is not DeadEnginePolicy.CONTINUE:
            raise ValueError(
                "server.stragglers.enabled true needs server.dead_engine_policy continue, not "
                f"{policy.value}: a late sample that starts over would be sampled twice"
            )
        return self


class RayConfig(SettingsModel):
    """The Ray cluster that hosts engines and trainer."""

    address: str | None = None
    """Cluster to join (``auto``, ``host:port`` of its head); absent starts a local one. This
    machine has to be a node of it: ``ray://`` addresses are refused."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; the machine's when absent."""
    object_store_mib: int = Field(default=256, ge=80)
    """Object store of a local cluster."""

    @field_validator("address")
    @classmethod
    def not_through_ray_client(cls, address: str | None) -> str | None:
        if address is not None and "://" in address:
            raise ValueError(
                f"ray.address {address!r} goes through Ray Client, which passes calls on from a "
                "machine outside of the cluster. It cannot stream from actors, and weights are "
                "handed over in files and memory of the node one runs on. Make this machine a node "
                "(ray start --address=HEAD:6379) and set ray.address to HEAD:6379 or auto"
            )
        return address


class ScoringConfig(SettingsModel):
    """The reward workers."""

    num_workers: int = Field(default=1, ge=1)
    """Reward processes."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Per sample; a worker that takes longer is killed and replaced."""
    rewards: dict[str, str] = Field(default_factory=dict)
    """User rewards: name -> ``module:function``."""
    max_cpu_s: int | None = Field(default=None, ge=1)
    """CPU seconds a worker, or a process a reward has started, may use per sample; beyond that the
    kernel ends it. Bounds what outlives ``timeout_s``; None is no limit."""
    max_memory_mib: int | None = Field(default=None, ge=256)
    """Address space of a worker, and of each process a reward starts; None is no limit."""
    network: NetworkAccess = NetworkAccess.ALLOW
    """``deny`` keeps workers, and what they start, from opening sockets of any kind. Linux only."""
    allow_code_execution: bool = False
    """Allow the reward ``code_tests``, which executes code of completions and of requests as the
    server's user, confined."""
