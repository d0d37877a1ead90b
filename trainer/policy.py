"""The policy being trained: a Hugging Face causal LM in float32 master weights.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from shared.config.engine import ModelConfig
from shared.errors import ConfigurationError
from trainer.batching import MicroBatch
from trainer.gathering import ShardGroup, rounded_pieces

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """What a forward pass says about the tokens of a micro-batch; 0 outside the completion."""

    logprobs_BT: torch.Tensor  # float32, with gradient when enabled
    entropy_BT: torch.Tensor  # float32, nats, never with gradient


class Policy:
    """Scores tokens and hands out its weights. Owns the model; the optimizer is elsewhere."""

    def __init__(
        self,
        model: Any,
        *,
        served_dtype: torch.dtype,
        device: torch.device,
        shards: ShardGroup | None = None,
    ) -> None:
        """
        Args:
            shards: the ranks of a model under ``fully_shard``; None where there is one rank.
        """
        self.model = model.to(device)
        self.shards = shards
        self.served_dtype = served_dtype
        self.device = device

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: ModelConfig,
        *,
        device: torch.device,
        gradient_checkpointing: bool = False,
    ) -> Policy:
        """Load a model directory in float32.

        Half-precision weights would swallow small updates (bfloat16 has 8 bits of mantissa), so the
        trainer keeps float32 and rounds to the served dtype when it publishes.

        Args:
            path: where the weights are: ``config.path``, or a checkpoint of ours.
            config: the served model; its dtype is what is published.

        Raises:
            ConfigurationError: the directory is no loadable causal LM.
        """
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
            served_dtype = _served_dtype(config)
        except (OSError, ValueError) as exc:
            raise ConfigurationError(
                f"model.path {str(path)!r} is not a loadable causal language model: {exc}",
                param="model.path",
            ) from exc
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        # Dropout would make the policy that is trained another one than the policy that samples.
        model.eval()
        return cls(model, served_dtype=served_dtype, device=device)

    @property
    def pad_token_id(self) -> int:
        """An id for padding; which one does not matter, padding is masked everywhere."""
        return 0

    def score(self, batch: MicroBatch, temperature: float) -> TokenScores:
        """Logprob of every completion token under ``log_softmax(logits / temperature)``.

        This is the distribution tokens are sampled from, so it compares with the engine's behaviour
        logprobs. Top-p and top-k renormalization is not applied: with them the two differ.
        """
        mask_BT = batch.completion_mask_BT
        # Logits are needed from the token before the first completion token on; the vocabulary
        # dimension makes them the largest tensor of the step.
        first = int(mask_BT.any(dim=0).nonzero()[0]) - 1
        with torch.autocast(
            self.device.type,
            dtype=self.served_dtype,
            enabled=self.served_dtype is not torch.float32,
        ):
            logits_BTV = self.model(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                logits_to_keep=batch.input_ids_BT.shape[1] - first,
                use_cache=False,
            ).logits
        logprobs_BTV = torch.log_softmax(logits_BTV[:, :-1].float() / temperature, dim=-1)
        targets_BT = batch.input_ids_BT[:, first + 1 :]
        kept_BT = logprobs_BTV.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            entropy_kept_BT = -(logprobs_BTV.exp() * logprobs_BTV).sum(dim=-1)
        return TokenScores(
            logprobs_BT=_pad_left(kept_BT, first + 1).masked_fill(~mask_BT, 0.0),
            entropy_BT=_pad_left(entropy_kept_BT, first + 1).masked_fill(~mask_BT, 0.0),
        )

    def served_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and weights, as they are kept here; ``served_pieces`` rounds them.

        Tied tensors come once, under their first name (the embedding, not the LM head). Buffers
        that are not saved with the model (rotary tables) stay out.
        """
        seen: set[int] = set()
        aliases = _tied_names(self.model)
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, DTensor):
                # A shard tells nothing by its address: on some ranks it may be empty.
                if name not in aliases:
                    yield name, tensor.detach()
                continue
            if tensor.data_ptr() in seen and tensor.numel() > 0:
                continue
            seen.add(tensor.data_ptr())
            yield name, tensor.detach()

    def dtype_served(self, tensor: torch.Tensor) -> torch.dtype:
        """The dtype in which engines take a tensor."""
        return self.served_dtype if tensor.is_floating_point() else tensor.dtype

    def served_pieces(self, tensor: torch.Tensor, piece_bytes: int) -> Iterator[torch.Tensor]:
        """The tensor in the served dtype and on the CPU, flat, at most ``piece_bytes`` at a time.

        So that publishing never holds a second copy of the model, nor of a large embedding. What
        is sharded comes from the other ranks, inside ``push_together``.
        """
        if isinstance(tensor, DTensor):
            if self.shards is None:
                raise ValueError("a sharded model needs a ShardGroup (Policy.shards)")
            return self.shards.pieces(tensor, piece_bytes)
        return rounded_pieces(tensor, self.dtype_served(tensor), piece_bytes)

    def push_together(self, publish: Callable[[], int]) -> int:
        """The version that ``publish`` gives; with shards called by all ranks and run by the first.

        Raises:
            SlipstreamError: what ``publish`` raises, on every rank; or a rank went away.
        """
        if self.shards is None:
            return publish()
        tensors = [(tensor, self.dtype_served(tensor)) for _, tensor in self.served_tensors()]
        return self.shards.push(tensors, publish)


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        ConfigurationError: ``cuda`` is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "trainer.device is cuda, but torch sees no CUDA device", param="trainer.device"
        )
    return torch.device(name)


def _served_dtype(config: ModelConfig) -> torch.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    saved = AutoConfig.from_pretrained(
        config.path, trust_remote_code=config.trust_remote_code
    ).dtype
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _pad_left(values_BT: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(values_BT, (count, 0))


def _tied_names(model: torch.nn.Module) -> set[str]:
    """Names of parameters that have another name before."""
    first: dict[int, str] = {}
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }
