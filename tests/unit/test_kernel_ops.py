"""Every op of vLLM's that the drafter calls is checked at start, or tried and done without."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rollout_server.drafter
from rollout_server.drafter.kernels import int4_vnni, int8_rows
from rollout_server.drafter.kernels.base import DraftKernel, LayerShape
from rollout_server.drafter.kernels.factory import make_draft_kernel
from rollout_server.drafter.kernels.int4 import Int4Matmul
from rollout_server.drafter.kernels.int8 import OnednnInt8Matmul
from rollout_server.drafter.plan import DeviceAbilities, DrafterPlan
from rollout_server.engine.vllm_plugin.compatibility import (
    CPU_SYMBOLS,
    CUDA_SYMBOLS,
    REQUIRED_SYMBOLS,
)
from shared.config.engine import DrafterConfig

CALLED = re.compile(r"(?<![\w.])(?:torch\.ops\._C|ops)\.([a-z]\w+)")
"""``torch.ops._C.name``, or ``ops.name`` of ``vllm._custom_ops``."""
OPTIONAL = {*int8_rows.OPTIONAL_OPS, *int4_vnni.OPTIONAL_OPS}
FALLBACKS: dict[str, tuple[Any, tuple[str, ...], type]] = {
    # the cached trial, the ops it tries, and who takes the layer without them
    "int8": (int8_rows._kernel_works, int8_rows.OPTIONAL_OPS, OnednnInt8Matmul),
    "int4": (int4_vnni.is_available, int4_vnni.OPTIONAL_OPS, Int4Matmul),
}


class OtherOps:
    """``torch.ops._C`` of another build: some ops replaced, or (None) not there."""

    def __init__(self, changed: dict[str, Any]) -> None:
        self._changed = changed
        self._real = torch.ops._C

    def __getattr__(self, name: str) -> Any:
        op = self._changed[name] if name in self._changed else getattr(self._real, name)
        if op is None:
            raise AttributeError(name)
        return op


class WrongProduct:
    """An op whose layout or scale is not what ours is packed for."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def default(self, *args: Any) -> torch.Tensor:
        return self._real.default(*args) * 2


class OtherArguments:
    """An op whose signature changed."""

    @staticmethod
    def default(*args: Any) -> torch.Tensor:
        raise RuntimeError("expected at most 3 arguments")


@pytest.fixture(params=["int8", "int4"])
def scheme(request: pytest.FixtureRequest) -> Iterator[str]:
    trial = FALLBACKS[request.param][0]
    trial.cache_clear()
    yield request.param
    trial.cache_clear()


def kernel_of(scheme: str) -> Any:
    plan = DrafterPlan.from_config(
        DrafterConfig.model_validate({"scheme": scheme}), DeviceAbilities(device_type="cpu")
    )
    shape = LayerShape(num_outputs=64, num_inputs=128, dtype=torch.bfloat16)
    return make_draft_kernel(plan, shape, "cpu")


def test_every_op_is_required_or_optional() -> None:
    symbols = REQUIRED_SYMBOLS + CPU_SYMBOLS + CUDA_SYMBOLS
    checked = {part for symbol in symbols for part in symbol.path.split(".")}
    folder = Path(rollout_server.drafter.__file__).parent
    called = {name for file in folder.rglob("*.py") for name in CALLED.findall(file.read_text())}
    assert called >= OPTIONAL | {"greedy_argmax", "scaled_int8_quant", "onednn_scaled_mm"}
    assert called - checked == OPTIONAL


def test_without_an_optional_op_another_kernel_takes_the_layer(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, names, fallback = FALLBACKS[scheme]
    if not trial():
        pytest.skip("this CPU has the fallback only")
    for name in names:
        trial.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "_C", OtherOps({name: None}))
            kernel = kernel_of(scheme)
        assert isinstance(kernel, DraftKernel), f"without {name}"
        assert isinstance(kernel.matmul, fallback)


@pytest.mark.parametrize("change", [WrongProduct, lambda real: OtherArguments()])
def test_an_op_that_is_not_the_one_we_know_is_not_used(
    scheme: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, names, fallback = FALLBACKS[scheme]
    if not trial():
        pytest.skip("this CPU has the fallback only")
    trial.cache_clear()
    multiply = names[0]
    changed = change(getattr(torch.ops._C, multiply))
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "_C", OtherOps({multiply: changed}))
        kernel = kernel_of(scheme)
    assert isinstance(kernel.matmul, fallback)
