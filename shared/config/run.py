"""The whole configuration of a deployment, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from shared.config.base import SettingsModel
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.observability import LoggingConfig, TracingConfig
from shared.config.server import RayConfig, ScoringConfig, ServerConfig
from shared.config.speculation import SpeculationConfig
from shared.config.trainer import TrainerConfig
from shared.config.vllm_arguments import vllm_arguments_problem
from shared.config.weights import WeightsConfig
from shared.types import SpeculationMode


class DemoModelConfig(SettingsModel):
    """``slipstream run`` makes ``model.path`` of it when the directory does not exist."""

    preset: str = "tiny-arithmetic"
    """A shape that ``slipstream make-model`` knows."""
    warm_start_steps: int = Field(default=400, ge=0)
    """Most supervised steps before it is written; fewer where it is right often enough."""
    seed: int = 0
    """Of its weights and data."""


class RunConfig(SettingsModel):
    """Everything ``slipstream serve | train | run`` needs."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$")
    """Of the run and of its directory; one that is taken gets ``-2``, ``-3``, ..."""
    output_dir: str = "runs"
    """Where run directories are."""
    seed: int = 0
    """Of the trainer's own random draws."""
    logging: LoggingConfig = LoggingConfig()
    tracing: TracingConfig = TracingConfig()
    model: ModelConfig
    demo_model: DemoModelConfig | None = None
    engine: EngineConfig = EngineConfig()
    drafter: DrafterConfig = DrafterConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    server: ServerConfig = ServerConfig()
    ray: RayConfig = RayConfig()
    weights: WeightsConfig = WeightsConfig()
    scoring: ScoringConfig = ScoringConfig()
    trainer: TrainerConfig = TrainerConfig()

    @property
    def run_dir(self) -> Path:
        """Where a run leaves everything it writes: ``output_dir/name``."""
        return Path(self.output_dir) / self.name

    @property
    def weights_state_dir(self) -> Path:
        """Where the server records what it has committed."""
        return Path(self.weights.state_dir or self.run_dir / "weights")

    @property
    def rollout_ledger_file(self) -> Path:
        """Where the server records rollout requests and finished groups (``server.ledger``)."""
        return self.run_dir / "rollouts.sqlite3"

    @model_validator(mode="after")
    def speculation_needs_a_drafter(self) -> Self:
        if not self.drafter.enabled and self.speculation.mode is not SpeculationMode.OFF:
            raise ValueError(
                f"speculation.mode {self.speculation.mode.value} needs drafter.enabled true "
                "(or set speculation.mode off)"
            )
        return self

    @model_validator(mode="after")
    def buckets_fit_the_object_store(self) -> Self:
        if not self.weights.spans_nodes or self.ray.address is not None:
            return self  # of a cluster that is joined, the server asks the nodes themselves
        store_mib, bucket_mib = self.ray.object_store_mib, self.weights.bucket_mib
        if store_mib < 2 * bucket_mib:
            raise ValueError(
                f"weights.transport {self.weights.transport.value} needs room for two buckets in "
                f"the object store: set ray.object_store_mib {store_mib} to "
                f"{2 * bucket_mib} or more, or weights.bucket_mib {bucket_mib} to "
                f"{store_mib // 2} or less"
            )
        return self

    @model_validator(mode="after")
    def vllm_arguments_can_work(self) -> Self:
        problem = vllm_arguments_problem(
            self.engine.vllm_args, drafter_enabled=self.drafter.enabled
        )
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def completion_fits_the_context(self) -> Self:
        if "sampling" not in self.trainer.model_fields_set:
            return self  # a server's configuration need not care about the trainer's defaults
        limit = self.model.max_model_len
        wanted = self.trainer.sampling.max_tokens
        if limit is not None and wanted >= limit:
            raise ValueError(
                f"trainer.sampling.max_tokens {wanted} leaves no room for a prompt in "
                f"model.max_model_len {limit}"
            )
        return self
