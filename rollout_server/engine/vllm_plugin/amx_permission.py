"""On a CPU with AMX, vLLM's processes ask the kernel for the right to use its tiles.

Linux kills whoever uses them without (``Documentation/arch/x86/xstate.rst``). For bfloat16 vLLM's
attention uses AMX where the processor has it, and leaves the asking to oneDNN. That only asks when
it picks AMX itself, which it does not for the layers of a small model: the engine died in its first
step. Leans on vLLM 0.32.0 (``vllm.v1.attention.backends.cpu_attn._get_attn_isa``) and torch 2.13.0
(``torch.cpu._init_amx``, which asks, and says whether it was granted).
"""

from __future__ import annotations

import logging

import torch

LOGGER = logging.getLogger(__name__)


def ask_for_amx() -> None:
    """For this process and all of its threads; nothing where the processor has no AMX."""
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        LOGGER.warning("the kernel does not let this process use AMX: bfloat16 attention may fail")
