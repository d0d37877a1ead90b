"""The CUDA kernels go through Triton's compiler for a Hopper GPU, which needs none to be there.

The interpreter that the other tests use runs Python and does not see what the compiler refuses.
"""

from __future__ import annotations

from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from rollout_server.drafter import triton_quantization

HOPPER = GPUTarget("cuda", 90, 32)
WEIGHT = {"weight_ptr": "*bf16", "scales_ptr": "*fp32", "num_columns": "i32"}


def machine_code(kernel: Any, arguments: dict[str, str], constants: dict[str, Any]) -> bytes:
    """What would be loaded onto the GPU."""
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    in_order = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=in_order, constexprs=constants)
    code: bytes = compile(source, target=HOPPER, options={"enable_fp_fusion": False}).asm["cubin"]
    return code


@pytest.mark.parametrize("num_columns", [256, 32768])
def test_the_int8_kernel_compiles(num_columns: int) -> None:
    arguments = {**WEIGHT, "values_ptr": "*i8"}
    kernel = triton_quantization._int8_kernel
    assert machine_code(kernel, arguments, {"COLUMNS": num_columns})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_the_int4_kernel_compiles(symmetric: bool, group_size: int) -> None:
    counts = {"num_rows": "i32", "num_groups": "i32"}
    arguments = {**WEIGHT, "packed_ptr": "*i32", "zeros_ptr": "*u8", **counts}
    constants = {
        "SYMMETRIC": symmetric,
        "GROUP_WORDS": group_size // 8,
        "ROWS": triton_quantization.ROWS_PER_PROGRAM,
    }
    assert machine_code(triton_quantization._int4_kernel, arguments, constants)
