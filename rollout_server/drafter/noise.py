"""Draws tokens from rows of logits with vLLM's kernels, seeded where a request has a seed.

Legend: R rows, V vocabulary.

Leans on (vLLM 0.32.0): ``torch.ops._C.fused_gumbel_argmax`` and ``greedy_argmax`` on CPU, which
vLLM's own sampler draws with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

SEED_LIMIT = 2**31
"""Of ``fused_gumbel_argmax``'s per-row seeds, as vLLM's sampler draws them."""


def draw_tokens(logits_RV: torch.Tensor, generators: Mapping[int, torch.Generator]) -> torch.Tensor:
    """One token per row, distributed as the row's softmax (Gumbel-max).

    Args:
        logits_RV: float32, contiguous; ``-inf`` is never drawn. Overwritten on CUDA.
        generators: generator of each row whose request has a seed.

    Returns:
        int64 [R].
    """
    if logits_RV.device.type == "cpu":
        seeds_R = torch.randint(0, SEED_LIMIT, (logits_RV.shape[0],), dtype=torch.int64)
        for row, generator in generators.items():
            seeds_R[row] = torch.randint(0, SEED_LIMIT, (), generator=generator, dtype=torch.int64)
        tokens_R: torch.Tensor = torch.ops._C.fused_gumbel_argmax(logits_RV, seeds_R)
        return tokens_R.view(-1).to(torch.int64)
    noise_RV = torch.empty_like(logits_RV).exponential_()
    for row, generator in generators.items():
        noise_RV[row].exponential_(generator=generator)
    return logits_RV.sub_(noise_RV.log_()).argmax(dim=-1)


def likeliest_tokens(logits_RV: torch.Tensor) -> torch.Tensor:
    """The token greedy decoding takes, int64 [R], ties broken as vLLM's sampler breaks them."""
    if logits_RV.device.type == "cpu":
        tokens_R: torch.Tensor = torch.ops._C.greedy_argmax(logits_RV)
        return tokens_R.view(-1).to(torch.int64)
    return logits_RV.argmax(dim=-1)


def draw_uniforms(
    counts: list[int], generators: Mapping[int, torch.Generator], device: torch.device
) -> torch.Tensor:
    """float64 [sum(counts)] in [0, 1), ``counts[i]`` of them for request i.

    float64, because float32 draws exactly 0 often enough to matter.
    """
    uniforms = torch.rand(sum(counts), dtype=torch.float64, device=device)
    if generators:
        start = 0
        for request, count in enumerate(counts):
            generator = generators.get(request)
            if generator is not None and count:
                uniforms[start : start + count].uniform_(generator=generator)
            start += count
    return uniforms
