"""What goes into a simulation and what comes out of it. Plain facts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.simulated_batch import SimulatedMemory
from shared.types import SpeculationReason


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedMachine:
    """The truth about an engine."""

    cost_model: CostModel
    memory: SimulatedMemory
    step_noise: float = 0.0
    """Standard deviation of the logarithm of a step's seconds."""
    stall_share: float = 0.0
    """Share of steps that take ``stall_factor`` times as long: somebody else's work."""
    stall_factor: float = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedEvent:
    """Something changes; None: stays as it is."""

    time_s: float
    slow_factor: float | None = None
    """Every step takes this many times its seconds from now on."""
    acceptance_per_pos: tuple[float, ...] | None = None
    weights_changed: bool = False
    """The controller is told of new weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedStep:
    """One step."""

    time_s: float
    """When it began."""
    duration_s: float
    num_running_reqs: int
    kv_cache_usage: float
    num_speculative_tokens: int
    reason: SpeculationReason
    num_tokens: int
    """Generated."""


@dataclass(kw_only=True, slots=True)
class SimulationResult:
    """What came of it."""

    time_s: float = 0.0
    num_tokens: int = 0
    num_preemptions: int = 0
    steps: list[SimulatedStep] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.time_s

    @property
    def steps_per_k(self) -> Counter[int]:
        return Counter(step.num_speculative_tokens for step in self.steps)

    @property
    def num_switches(self) -> int:
        """Changes of the draft length, trials included."""
        lengths = [step.num_speculative_tokens for step in self.steps]
        return sum(a != b for a, b in pairwise(lengths))
