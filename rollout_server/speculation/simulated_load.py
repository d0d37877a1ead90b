"""Requests for the simulator: synthetic lengths, or those of a recorded run. Pure but I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MEDIAN_PROMPT_TOKENS = 180
MAX_PROMPT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedRequest:
    """One rollout."""

    num_prompt_tokens: int
    num_output_tokens: int
    arrival_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthDistribution:
    """Log-normal response lengths, cut off at the longest a request may be."""

    name: str
    median_tokens: int
    sigma: float
    """Of the logarithm: 0.6 is what the reference's short answers show, 0.9 to 1 a long tail."""
    max_tokens: int

    def sample(self, num_requests: int, seed: int) -> list[SimulatedRequest]:
        """One batch, all of it there at the start."""
        rng = np.random.default_rng(seed)
        median = np.log(self.median_tokens)
        outputs = rng.lognormal(median, self.sigma, num_requests).clip(1, self.max_tokens)
        prompts = rng.lognormal(np.log(MEDIAN_PROMPT_TOKENS), 0.5, num_requests)
        return [
            SimulatedRequest(num_prompt_tokens=int(prompt), num_output_tokens=int(output))
            for prompt, output in zip(prompts.clip(8, MAX_PROMPT_TOKENS), outputs, strict=True)
        ]


SHORT = LengthDistribution(name="short", median_tokens=520, sigma=0.6, max_tokens=8192)
"""Mean about 620 and longest of a thousand about 3.5k: the reference's own training runs."""
TAIL_8K = LengthDistribution(name="tail-8k", median_tokens=1500, sigma=0.9, max_tokens=8192)
TAIL_16K = LengthDistribution(name="tail-16k", median_tokens=3000, sigma=0.9, max_tokens=16384)
TAIL_32K = LengthDistribution(name="tail-32k", median_tokens=5000, sigma=1.0, max_tokens=32768)
DISTRIBUTIONS = (SHORT, TAIL_8K, TAIL_16K, TAIL_32K)


def steady(
    num_requests: int, num_prompt_tokens: int, arrival_s: float = 0.0
) -> list[SimulatedRequest]:
    """Requests that never end within a simulation that does."""
    request = SimulatedRequest(
        num_prompt_tokens=num_prompt_tokens, num_output_tokens=1 << 30, arrival_s=arrival_s
    )
    return [request] * num_requests


def recorded(
    lines: Iterable[str], num_prompt_tokens: int = MEDIAN_PROMPT_TOKENS
) -> list[SimulatedRequest]:
    """From rollout records: JSON lines with ``num_tokens`` and perhaps ``num_prompt_tokens``.

    Raises:
        ValueError: naming the line that has no length.
    """
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = json.loads(line)
        num_tokens = record.get("num_tokens") if isinstance(record, dict) else None
        if not isinstance(num_tokens, int) or num_tokens < 1:
            raise ValueError(f"line {number}: num_tokens is {num_tokens!r}, not a length")
        requests.append(
            SimulatedRequest(
                num_prompt_tokens=int(record.get("num_prompt_tokens", num_prompt_tokens)),
                num_output_tokens=num_tokens,
            )
        )
    return requests


def read_recorded(path: Path) -> list[SimulatedRequest]:
    """Requests of a recorded file."""
    with path.open(encoding="utf-8") as file:
        return recorded(file)


def total_tokens(requests: Sequence[SimulatedRequest]) -> int:
    """Tokens that a run to the end generates, whatever is drafted."""
    return sum(request.num_output_tokens for request in requests)
