"""AdamW over the policy's parameters: groups, learning-rate warm-up, clipping, saved state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shared.config.trainer import OptimizerConfig
from shared.errors import SlipstreamError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerStepStats:
    """One update: the gradient's norm before clipping, and the rate it was applied with."""

    grad_norm: float
    learning_rate: float


class Optimization:
    """The optimizer and how many updates it has made."""

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig) -> None:
        self._config = config
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decayed = [parameter for _, parameter in self._named if parameter.dim() >= 2]
        others = [parameter for _, parameter in self._named if parameter.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                # Decay of norms and biases only fights what they are for.
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
        )
        self.num_updates = 0

    def zero_grad(self) -> None:
        """Forget accumulated gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> OptimizerStepStats:
        """Clip, update, forget the gradients.

        Raises:
            SlipstreamError: the gradient is not finite; the weights are as they were.
        """
        config = self._config
        grad_norm = float(
            torch.nn.utils.clip_grad_norm_(
                [parameter for _, parameter in self._named], config.max_grad_norm
            )
        )
        if not torch.isfinite(torch.tensor(grad_norm)):
            raise SlipstreamError(
                f"gradient norm is {grad_norm} at update {self.num_updates + 1}: the weights were "
                "left as they are; lower trainer.optimizer.learning_rate or resume an earlier "
                "checkpoint"
            )
        learning_rate = learning_rate_at(self.num_updates, config)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.zero_grad()
        self.num_updates += 1
        return OptimizerStepStats(grad_norm=grad_norm, learning_rate=learning_rate)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """State as ``<parameter name>/<slot>``; slots are ``exp_avg``, ``exp_avg_sq``, ``step``."""
        return {
            f"{name}/{slot}": value.detach().cpu().contiguous()
            for name, parameter in self._named
            for slot, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load_state_tensors(self, tensors: dict[str, torch.Tensor], num_updates: int) -> None:
        """Restore what ``state_tensors`` gave.

        Raises:
            SlipstreamError: a tensor belongs to no parameter of this model.
        """
        parameters = dict(self._named)
        state: dict[torch.nn.Parameter, dict[str, Any]] = {}
        for key, value in tensors.items():
            name, _, slot = key.rpartition("/")
            if name not in parameters:
                raise SlipstreamError(f"optimizer state {key!r} belongs to no model parameter")
            parameter = parameters[name]
            # AdamW keeps its step count on the CPU; the moments live with the parameter.
            device = torch.device("cpu") if slot == "step" else parameter.device
            state.setdefault(parameter, {})[slot] = value.to(device)
        self._optimizer.state.update(state)
        self.num_updates = num_updates


def learning_rate_at(num_updates: int, config: OptimizerConfig) -> float:
    """Linear warm-up over ``warmup_steps`` updates, then constant.

    With 4 warm-up steps the first updates use 1/4, 2/4, 3/4 and 4/4 of the rate.
    """
    if num_updates + 1 >= config.warmup_steps:
        return config.learning_rate
    return config.learning_rate * (num_updates + 1) / config.warmup_steps
