"""Which layers of the drafter are quantized and which are the target's own. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.config.engine import DrafterConfig
from shared.types import DrafterScheme

DRAFT_PREFIX = "draft_model."
"""vLLM's prefix of layer names in a ``draft_model`` drafter."""


MIN_INT4_CAPABILITY = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceAbilities:
    """What choosing a scheme needs to know of the device an engine runs on."""

    device_type: str
    """``cpu`` or ``cuda``."""
    compute_capability: int | None = None
    """Of a CUDA device, 80 for 8.0; None where it is not known."""


def resolve_scheme(scheme: DrafterScheme, device: DeviceAbilities) -> DrafterScheme:
    """What ``auto`` means on a device. Any other scheme is what it is.

    Drafting one token for a few sequences is a matter of bytes read per weight.

    - CPU: int8. With AVX-512 VNNI its kernel takes 0.41 of bfloat16's time at one row, int4's 0.25
      (2048 x 8192: 0.50, 0.29 and 1.2 ms), but attention, norms and sampling are the same for both,
      and int8's drafts are accepted more often (``make bench-speculation``: random weights, which
      are hard on int4; where a policy's int4 drafts are accepted nearly always, choose it).
    - CUDA from sm80: int4. Marlin and Machete run at the speed of memory, and a quarter of the
      bytes beats a half of them for as long as the batch is small, which is when we draft.
    - CUDA sm75: int8. There is no bfloat16 in hardware, which the int4 kernels compute in.
    """
    if scheme is not DrafterScheme.AUTO:
        return scheme
    if device.device_type != "cuda":
        return DrafterScheme.INT8
    capability = device.compute_capability
    if capability is not None and capability < MIN_INT4_CAPABILITY:
        return DrafterScheme.INT8
    return DrafterScheme.INT4


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterPlan:
    """The scheme after ``auto`` is resolved, and the exceptions to it."""

    scheme: DrafterScheme
    int4_group_size: int
    int4_symmetric: bool
    quantize_lm_head: bool
    exclude: tuple[re.Pattern[str], ...]

    @classmethod
    def from_config(cls, config: DrafterConfig, device: DeviceAbilities) -> DrafterPlan:
        return cls(
            scheme=resolve_scheme(config.scheme, device),
            int4_group_size=config.int4_group_size,
            int4_symmetric=config.int4_symmetric,
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
