"""Compares a vLLM worker's live weights with the file they are of, layer by layer.

Nothing that was noted at load time is trusted: what a layer computes with is read back and held
against the file's tensors, put together and split between ranks by vLLM's own loaders. Where the
CPU build has packed a weight away (inside oneDNN, whose memory cannot be read), the layer itself is
asked: multiplied with the identity it gives its weight back, exactly, since every product but one
is with zero. A drafter layer is packed again from the file's tensor, and must not change by that.
Nothing is changed: an engine that differs is for the server to replace.

Leans on (vLLM 0.32.0): ``LinearBase.weight_loader`` and ``VocabParallelEmbedding.weight_loader``
(the v1 loaders), ``QKVParallelLinear``, ``MergedColumnParallelLinear``; ``layer.cpu_linear`` as set
by ``dispatch_cpu_unquantized_gemm``; ``packed_modules_mapping`` of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import set_weight_attrs

from rollout_server.drafter.quantization import DraftLinearMethod
from rollout_server.drafter.sharing import draft_linear_methods, token_embedding

IDENTITY_ROWS = 256
"""Input channels that one product with a part of the identity reads back."""
LM_HEAD = "lm_head"


class AuditStatus(StrEnum):
    """What came of one parameter."""

    EQUAL = "equal"
    DIFFERENT = "different"
    SKIPPED = "skipped"
    """It cannot be compared by name: experts, and tensors that the model renames or transposes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One parameter of the target, or one layer of the drafter (``drafter`` before its name)."""

    name: str
    status: AuditStatus


def auditable_modules(model: Module) -> list[str]:
    """Modules with parameters of their own, in the model's order: the units of an audit."""
    return [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]


class WeightAudit:
    """Compares against one file, or a model directory."""

    def __init__(self, target: Module, drafter: Module | None, paths: Sequence[str]) -> None:
        self._target = target
        self._drafters = {} if drafter is None else draft_linear_methods(drafter)
        self._packed_modules = getattr(target, "packed_modules_mapping", {})
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def check(self, module_name: str) -> list[Finding]:
        """Everything of one module."""
        module = self._target.get_submodule(module_name)
        if isinstance(module, LinearBase | VocabParallelEmbedding):
            findings = list(self._check_matrix(module_name, module))
            skipped = {"weight"}
        else:
            findings, skipped = [], set()
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf not in skipped:
                name = f"{module_name}.{leaf}"
                findings.append(Finding(name, self._check_vector(module, name, parameter)))
        return findings

    def _check_matrix(self, name: str, module: Any) -> Iterator[Finding]:
        expected_NK = self._expected_matrix(name, module, "weight")
        if expected_NK is None:
            yield Finding(f"{name}.weight", AuditStatus.SKIPPED)
            return
        is_equal = all(
            torch.equal(live_NC, expected_NK[:, first : first + live_NC.shape[1]])
            for first, live_NC in live_columns(module, expected_NK)
        )
        status = AuditStatus.EQUAL if is_equal else AuditStatus.DIFFERENT
        yield Finding(f"{name}.weight", status)
        method = self._drafters.get(name)
        if method is not None:
            names = self._part_names(name, "weight")
            if method.quantizes_unrounded(sum(len(self._tensor(part)) for part in names)):
                unrounded_NK = self._expected_matrix(name, module, "weight", in_file_dtype=True)
                assert unrounded_NK is not None, "it was there in the model's dtype"
                expected_NK = unrounded_NK
            yield Finding(f"drafter {name}", check_drafter_layer(method, expected_NK))

    def _check_vector(self, module: Any, name: str, live: Parameter) -> AuditStatus:
        module_name, _, leaf = name.rpartition(".")
        if isinstance(module, LinearBase) and live.dim() == 1:
            expected = self._expected_matrix(module_name, module, leaf)
        elif name in self._file_of:
            expected = self._tensor(name).to(live.dtype)
        else:
            expected = None
        if expected is None or expected.shape != live.shape:
            return AuditStatus.SKIPPED
        is_equal = torch.equal(live.data, expected.to(device=live.device, dtype=live.dtype))
        return AuditStatus.EQUAL if is_equal else AuditStatus.DIFFERENT

    def _expected_matrix(
        self, name: str, module: Any, leaf: str, *, in_file_dtype: bool = False
    ) -> torch.Tensor | None:
        """This rank's part of a fused or split parameter, as vLLM's loader makes it of the file's
        tensors; None where the file has none of that name."""
        names = self._part_names(name, leaf)
        if any(part not in self._file_of for part in names):
            return None
        live = getattr(module, leaf)
        tensors = [self._tensor(part) for part in names]
        if leaf == "weight":
            shape: tuple[int, ...] = matrix_shape(module)
            if any(tensor.dim() != 2 for tensor in tensors):
                return None
        else:
            shape = tuple(live.shape)
        dtype = tensors[0].dtype if in_file_dtype else live.dtype
        scratch = Parameter(torch.zeros(shape, dtype=dtype, device=live.device), False)
        set_weight_attrs(scratch, {"input_dim": 1, "output_dim": 0})
        for index, tensor in enumerate(tensors):
            shard = shard_id(module, index, len(tensors))
            try:
                module.weight_loader(scratch, tensor, *shard)
            except (AssertionError, RuntimeError):
                return None  # renamed or transposed on the way in (GPT-2)
        return scratch.data

    def _part_names(self, name: str, leaf: str) -> list[str]:
        """Checkpoint tensors that make up a module's parameter."""
        parent, _, last = name.rpartition(".")
        parts = self._packed_modules.get(last, [last])
        names = [f"{parent}.{part}.{leaf}" if parent else f"{part}.{leaf}" for part in parts]
        if name == LM_HEAD and names[0] not in self._file_of:  # tied
            names = [f"{token_embedding(self._target)[0]}.{leaf}"]
        return names

    def _tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor


def shard_id(module: Any, index: int, num_parts: int) -> tuple[Any, ...]:
    """How vLLM's loader is told which of a fused layer's parts a tensor is."""
    if num_parts == 1:
        return ()
    if isinstance(module, QKVParallelLinear):
        return ("qkv"[index],)
    return (index,) if isinstance(module, MergedColumnParallelLinear) else ()


def matrix_shape(module: Any) -> tuple[int, int]:
    """[output channels, input channels] of this rank."""
    if isinstance(module, VocabParallelEmbedding):
        return module.num_embeddings_per_partition, module.embedding_dim
    outputs = getattr(module, "output_size_per_partition", module.output_size)
    return outputs, getattr(module, "input_size_per_partition", module.input_size)


def live_columns(module: Any, like_NK: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """What the module multiplies with, some input channels at a time.

    Yields:
        First input channel, and [N, channels].
    """
    weight = module.weight
    if weight.shape == like_NK.shape:
        yield 0, weight.data
    # A LM head on the CPU has both, the embedding's matrix and what was packed of it.
    cpu_linear = getattr(module, "cpu_linear", None)
    if cpu_linear is None or (isinstance(module, VocabParallelEmbedding) and not is_head(module)):
        return
    num_inputs = like_NK.shape[1]
    for first in range(0, num_inputs, IDENTITY_ROWS):
        rows = min(IDENTITY_ROWS, num_inputs - first)
        identity = torch.zeros(rows, num_inputs, dtype=like_NK.dtype, device=like_NK.device)
        identity[torch.arange(rows), torch.arange(first, first + rows)] = 1
        yield first, cpu_linear(identity, weight, None).t()


def is_head(module: Any) -> bool:
    """Whether the module is used as a LM head."""
    return isinstance(module, ParallelLMHead)


def check_drafter_layer(method: DraftLinearMethod, weight_NK: torch.Tensor) -> AuditStatus:
    """Pack a drafter layer again from its weight: it must have been just that. If it was not, it is
    left as it was found: an audit changes nothing."""
    before = [tensor.clone() for tensor in method.packed_tensors()]
    if not before:
        return AuditStatus.SKIPPED  # its kernel keeps the weight where it cannot be read
    method.pack(weight_NK)
    packed = method.packed_tensors()
    if all(torch.equal(old, new) for old, new in zip(before, packed, strict=True)):
        return AuditStatus.EQUAL
    for old, new in zip(before, packed, strict=True):
        new.copy_(old)
    return AuditStatus.DIFFERENT
