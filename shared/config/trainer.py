"""The trainer: optimizer, objective, loop and task."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.config.base import SettingsModel
from shared.schemas.base import JsonObject
from shared.types import MetricSinkKind


class ObjectiveConfig(SettingsModel):
    """GRPO (arXiv 2402.03300) with a clipped ratio."""

    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The ratio of the policy to that at the step's start is clipped below ``1 - clip_low``."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """Above ``clip_low`` this is DAPO's clip-higher."""
    normalize_by_std: bool = True
    """Divide group-centred rewards by the group's standard deviation (GRPO); False is Dr. GRPO."""
    importance_cap: float = Field(default=2.0, gt=0.0)
    """Cap on the ratio of the policy at the step's start to the one that sampled (truncated
    importance sampling)."""


class OptimizerConfig(SettingsModel):
    """AdamW."""

    learning_rate: float = Field(default=1e-6, gt=0.0)
    """After the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises linearly."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled, as AdamW has it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moving averages."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm."""
    epochs_per_batch: int = Field(default=1, ge=1)
    """Optimizer passes over each batch of rollouts."""
    minibatches_per_epoch: int = Field(default=1, ge=1)
    """Optimizer steps in each pass."""
    micro_batch_tokens: int = Field(default=16384, ge=256)
    """Padded tokens per forward/backward pass."""


class SamplingConfig(SettingsModel):
    """How rollouts are sampled."""

    temperature: float = Field(default=1.0, gt=0.0)
    """0 would be greedy, from which nothing is learnt."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling; 1 keeps every token."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest completion; has to leave room for a prompt in ``model.max_model_len``."""
    eval_temperature: float = Field(default=0.0, ge=0.0)
    """Of held-out evaluations; 0 is greedy."""


class ArithmeticTaskConfig(SettingsModel):
    """Generated arithmetic with worked answers; train and held-out problems never overlap."""

    kind: Literal["arithmetic"] = "arithmetic"
    """Sums that are made up."""
    seed: int = 1234
    """Of the problems."""
    num_terms: tuple[int, int] = (3, 8)
    """Smallest and largest number of terms; more terms mean longer answers (a long tail)."""
    max_operand: int = Field(default=9, ge=2)
    """Largest number in a problem."""
    held_out_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of all problems that is only for evaluation."""


class JsonlTaskConfig(SettingsModel):
    """Prompts with answers from JSONL files: ``{"prompt" | "messages", "answer"}`` per line."""

    kind: Literal["jsonl"] = "jsonl"
    """Files of yours."""
    train_path: str
    """File to train from."""
    held_out_path: str | None = None
    """File to evaluate on; what is in it is not trained on."""
    held_out_fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Used when ``held_out_path`` is absent."""
    prompt_field: str = "prompt"
    """Key of a prompt that is text; a chat is always ``messages``."""
    answer_field: str = "answer"
    """Key of the reference answer."""
    seed: int = 0
    """Of the order."""


TaskConfig = Annotated[ArithmeticTaskConfig | JsonlTaskConfig, Field(discriminator="kind")]


class RewardConfig(SettingsModel):
    """Which reward the server applies."""

    name: str = "numeric_answer"
    """A built-in reward, or one of ``scoring.rewards``."""
    params: JsonObject = Field(default_factory=dict)
    """Its parameters."""


class TrainerConfig(SettingsModel):
    """The training loop."""

    server_url: str | None = None
    """Rollout server; filled in by ``slipstream run``."""
    api_key_file: str | None = None
    """The trainer's API key (scopes ``rollout`` and ``admin``), readable by the owner only; else
    ``SLIPSTREAM_API_KEY``. ``slipstream run`` makes up a key of its own for the run."""
    ca_file: str | None = None
    """PEM certificates that the server's is checked against, instead of the system's."""
    api_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for the server without any progress."""
    push_retries: int = Field(default=1, ge=0)
    """Of a push that the server took back because engines failed in it. An accident does not repeat
    itself, and each attempt may cost engines, which are started again."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU where torch finds one."""
    num_threads: int = Field(default=0, ge=0)
    """Torch threads of the trainer; 0 leaves torch's default."""
    num_steps: int = Field(default=20, ge=0)
    """Optimizer steps of the run: one batch of rollouts and one push each."""
    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts of a batch."""
    group_size: int = Field(default=8, ge=2)
    """Samples per prompt; advantages are relative to their mean."""
    max_policy_lag: int = Field(default=1, ge=0)
    """Samples with a token whose policy is more updates old than this are not trained on."""
    batches_ahead: int = Field(default=0, ge=0)
    """Batches of later steps that are sampled while a step trains, with the weights that are there.
    0: sampling and training take turns. At most ``max_policy_lag``."""
    eval_every: int = Field(default=5, ge=0)
    """Steps between held-out evaluations; 0 evaluates only at start and end."""
    eval_prompts: int = Field(default=128, ge=1)
    """Held-out problems of an evaluation."""
    checkpoint_every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0 writes only the last one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The latest ones; older ones are removed."""
    metric_sinks: tuple[MetricSinkKind, ...] = ()
    """Where metrics go beside ``metrics.jsonl``; each needs its package (``pip install
    'slipstream-rollout[tensorboard]'`` and so on)."""
    metric_project: str = Field(default="slipstream", min_length=1)
    """Project of the run at Weights & Biases and in trackio."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: SamplingConfig = SamplingConfig()
    task: TaskConfig = ArithmeticTaskConfig()
    reward: RewardConfig = RewardConfig()

    @field_validator("metric_sinks")
    @classmethod
    def each_sink_once(cls, kinds: tuple[MetricSinkKind, ...]) -> tuple[MetricSinkKind, ...]:
        return tuple(dict.fromkeys(kinds))

    @model_validator(mode="after")
    def batches_ahead_can_be_trained_on(self) -> Self:
        if self.batches_ahead > self.max_policy_lag:
            raise ValueError(
                f"trainer.batches_ahead {self.batches_ahead} is above trainer.max_policy_lag "
                f"{self.max_policy_lag}: the batches would be too old when their step comes; raise "
                "the one or lower the other"
            )
        return self
