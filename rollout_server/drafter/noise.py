"""Draws tokens from rows of probabilities, seeded where a request has a seed.

Legend: R rows, V vocabulary.

Leans on (vLLM 0.32.0): ``torch.ops._C.greedy_argmax`` on CPU, with which vLLM's own sampler breaks
ties.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

BELOW_ONE = 1 - 2**-52
"""Keeps the product of a uniform number and a row's total below that total after rounding."""


def draw_tokens(
    weights_RV: torch.Tensor, generators: Mapping[int, torch.Generator]
) -> torch.Tensor:
    """One token per row, with probability in proportion to its weight; never one of weight 0.

    Args:
        weights_RV: float32, not negative, at least one above 0 in each row. Overwritten on CUDA.
        generators: generator of each row whose request has a seed.

    Returns:
        int64 [R].
    """
    if weights_RV.device.type == "cpu":
        # One uniform number a row, and float64 sums: a sixth of the time of Gumbel noise.
        uniforms_R1 = torch.rand(weights_RV.shape[0], 1, dtype=torch.float64)
        for row, generator in generators.items():
            uniforms_R1[row].uniform_(generator=generator)
        sums_RV = weights_RV.cumsum(dim=-1, dtype=torch.float64)
        wanted_R1 = uniforms_R1.mul_(BELOW_ONE).mul_(sums_RV[:, -1:])
        return torch.searchsorted(sums_RV, wanted_R1, right=True).squeeze(1)
    # Exponential races: no pass over the vocabulary depends on another.
    noise_RV = torch.empty_like(weights_RV).exponential_()
    for row, generator in generators.items():
        noise_RV[row].exponential_(generator=generator)
    return weights_RV.div_(noise_RV).argmax(dim=-1)


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
