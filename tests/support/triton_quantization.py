"""Compares the Triton quantizers with the reference; started as a process of its own by
``tests/unit/test_triton_quantization.py``, with ``TRITON_INTERPRET=1`` set before Triton is
imported. Prints one JSON object: case name to list of what differs."""

from __future__ import annotations

import json
from typing import Any

import torch

from rollout_server.drafter.schemes import quantize_int4_groups, quantize_int8_per_channel
from rollout_server.drafter.triton_quantization import (
    quantize_int4_groups_triton,
    quantize_int8_per_channel_triton,
)
from tests.support.weights import awkward_weight

NUM_ROWS, NUM_COLUMNS = 37, 256  # rows: no multiple of a program's
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def differences(found: Any, expected: Any, names: tuple[str, ...]) -> list[str]:
    pairs = ((name, getattr(found, name), getattr(expected, name)) for name in names)
    return [
        name
        for name, left, right in pairs
        if (left is None) != (right is None) or (left is not None and not torch.equal(left, right))
    ]


def refusal(**arguments: Any) -> str:
    try:
        quantize_int4_groups_triton(torch.zeros(2, 96), symmetric=True, **arguments)
    except ValueError as exc:
        return str(exc)
    return "accepted"


def main() -> None:
    report: dict[str, Any] = {}
    for dtype_name, dtype in DTYPES.items():
        weight = awkward_weight(dtype, NUM_ROWS, NUM_COLUMNS)
        report[f"int8-{dtype_name}"] = differences(
            quantize_int8_per_channel_triton(weight),
            quantize_int8_per_channel(weight),
            ("values_NK", "scales_N1"),
        )
        for group_size in (32, 64, 128):
            for symmetric in (True, False):
                kind = "symmetric" if symmetric else "asymmetric"
                report[f"int4-{kind}-{group_size}-{dtype_name}"] = differences(
                    quantize_int4_groups_triton(weight, group_size=group_size, symmetric=symmetric),
                    quantize_int4_groups(weight, group_size=group_size, symmetric=symmetric),
                    ("packed_NP", "scales_NG", "zeros_NG"),
                )
    report["refusals"] = [refusal(group_size=64), refusal(group_size=12), refusal(group_size=24)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
