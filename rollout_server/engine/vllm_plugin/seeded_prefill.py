"""Repairs seeded requests whose prompt is prefilled in pieces, which stop vLLM's CPU engine.

vLLM samples a token for every request of a step, throws it away where the prompt is not done, and
turns the request's generator back by the numbers that took. A CPU generator cannot be turned back:
``set_offset`` raises, and the engine dies. Here such requests sample without their generator, so
there is nothing to turn back.

Leans on (vLLM 0.32.0): ``GPUModelRunner.sample_tokens``, inside which all sampling and the turning
back happen; ``discard_request_mask``; ``InputBatch.generators``, which is the dictionary that
``SamplingMetadata`` refers to.

Removal check: ``tests/integration/test_proof_seeds.py`` passes without it.
"""

from __future__ import annotations

from typing import Any


def sample_unfinished_prompts_without_seed(sample_tokens: Any) -> Any:
    """Wrap ``GPUModelRunner.sample_tokens``."""

    def wrapped(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        discarded = runner.discard_request_mask.np
        set_aside = {row: generators.pop(row) for row in list(generators) if discarded[row]}
        try:
            return sample_tokens(runner, *args, **kwargs)
        finally:
            generators.update(set_aside)

    return wrapped
