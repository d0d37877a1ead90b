"""What an engine's step times depend on, as a calibration's key. Reads vLLM's configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rollout_server.engine.arguments import EngineSpec
from rollout_server.speculation.calibration import CalibrationKey
from shared.types import DrafterScheme

SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "sliding_window",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


def calibration_key(spec: EngineSpec, vllm_config: Any, scheme: DrafterScheme) -> CalibrationKey:
    """The key of an engine that has started.

    Args:
        vllm_config: ``vllm.config.VllmConfig`` (0.32.0).
        scheme: of the drafter, ``auto`` resolved.
    """
    import vllm

    text_config = vllm_config.model_config.hf_text_config
    shape = {name: getattr(text_config, name, None) for name in SHAPE_FIELDS}
    drafter: dict[str, int | str | bool] = {
        "scheme": scheme.value,
        "quantize_lm_head": spec.drafter.quantize_lm_head,
        "exclude": " ".join(spec.drafter.exclude),
    }
    if scheme is DrafterScheme.INT4:
        drafter |= {
            "int4_group_size": spec.drafter.int4_group_size,
            "int4_symmetric": spec.drafter.int4_symmetric,
        }
    return CalibrationKey(
        device=_device_name(spec),
        vllm_version=vllm.__version__.split("+")[0],
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        tensor_parallel_size=spec.engine.tensor_parallel_size,
        model_shape={name: value for name, value in shape.items() if value is not None},
        drafter=drafter,
        enforce_eager=spec.engine.enforce_eager,
    )


def _device_name(spec: EngineSpec) -> str:
    if spec.device == "cpu":
        return f"{cpu_model_name()} cores {spec.cpu_cores or f'all {os.cpu_count()}'}"
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name())


def cpu_model_name() -> str:
    """As the kernel reports it; the numbers too, for virtual machines all call a line of processors
    by one name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown cpu"
    return cpu_name_in(text)


def cpu_name_in(cpuinfo: str) -> str:
    """Name, family and model of the first processor in the text of ``/proc/cpuinfo``."""
    first = cpuinfo.partition("\n\n")[0]
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    name = fields.get("model name", "unknown cpu")
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name
