"""Which layers of the drafter are quantized and which are the target's own. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.config.engine import DrafterConfig
from shared.types import DrafterScheme

DRAFT_PREFIX = "draft_model."
"""vLLM's prefix of layer names in a ``draft_model`` drafter."""


def resolve_scheme(scheme: DrafterScheme, device_type: str) -> DrafterScheme:
    """What ``auto`` means on a device: int8 W8A8 on CPU and CUDA."""
    if scheme is DrafterScheme.AUTO:
        return DrafterScheme.INT8
    return scheme


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterPlan:
    """The scheme after ``auto`` is resolved, and the exceptions to it."""

    scheme: DrafterScheme
    quantize_lm_head: bool
    exclude: tuple[re.Pattern[str], ...]

    @classmethod
    def from_config(cls, config: DrafterConfig, device_type: str) -> DrafterPlan:
        return cls(
            scheme=resolve_scheme(config.scheme, device_type),
            quantize_lm_head=config.quantize_lm_head,
            exclude=tuple(re.compile(pattern) for pattern in config.exclude),
        )

    def quantizes(self, layer_name: str) -> bool:
        """Whether a linear layer gets a quantized weight. Names are the target's."""
        name = layer_name.removeprefix(DRAFT_PREFIX)
        return self.scheme is not DrafterScheme.NONE and not any(
            pattern.search(name) for pattern in self.exclude
        )

    def quantizes_lm_head(self) -> bool:
        return self.quantize_lm_head and self.quantizes("lm_head")
