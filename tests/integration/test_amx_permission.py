"""Processes of an engine may use AMX before oneDNN has thought of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_server.engine.protocol import GenerateRequest
from shared.schemas.rollouts import SamplingOptions
from tests.support.engine import running_engine

torch = pytest.importorskip("torch")

PROBE = """
import ctypes
import vllm.platforms
from rollout_server.engine.vllm_plugin import register
register()
granted = ctypes.c_uint64()
SYS_arch_prctl, ARCH_GET_XCOMP_PERM = 158, 0x1022
ctypes.CDLL(None).syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, ctypes.byref(granted))
print("GRANTED", granted.value >> 18 & 1)  # the tiles' data (XFEATURE_XTILE_DATA)
"""


def tiles_granted(plugin: str) -> str:
    """By a process that has computed nothing."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "SLIPSTREAM_VLLM_PLUGIN": plugin},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("GRANTED")]
    return line.removeprefix("GRANTED ")


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX to ask for"
)
def test_a_process_with_the_plugin_asks_for_amx_and_one_without_does_not() -> None:
    assert tiles_granted(plugin="1") == "1"
    assert tiles_granted(plugin="0") == "0", "vLLM asks by itself: remove amx_permission.py"


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="session")
async def test_a_small_model_generates_in_bfloat16(tiny_model: Path) -> None:
    """Its layers are too small for oneDNN to take AMX, and its attention takes it."""
    settings = {"kv_cache_memory_mib": 64, "block_size": 32}
    async with running_engine(
        tiny_model, engine=settings, drafter={"enabled": False}, dtype="bfloat16"
    ) as engine:
        result = await engine.generate(
            GenerateRequest(
                request_id="small",
                prompt_token_ids=[1, 2, 3],
                n=2,
                sampling=SamplingOptions(max_tokens=20, ignore_eos=True),
            )
        )
    assert [len(sample.token_ids) for sample in result.samples] == [20, 20]
