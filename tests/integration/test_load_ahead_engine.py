"""Weights that a real engine makes ready before the pause of a push, while it generates."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from rollout_server.engine import weight_loading
from rollout_server.engine.actor import EngineActor
from shared.types import PauseMode
from shared.weights import build_manifest
from tests.support.architectures import QWEN2
from tests.support.engine import generate, greedy, probe, running_engine, speculate
from tests.support.models import greedy_reference, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

BLOCK_MODULES = {
    f"model.layers.{number}.{name}"
    for number in (0, 1)
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    )
}
"""All of the model but its last norm and the embedding, with which the LM head is tied."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineActor]:
    """Qwen 2: biases lie in tensors, beside packed weights."""
    path = QWEN2(tmp_path_factory.mktemp("start"), seed=3)
    async with running_engine(
        path,
        engine={"load_ahead_mib": 64},
        drafter={"scheme": "int8"},
        worker_extension="tests.support.ahead.AheadExtension",
    ) as actor:
        yield actor


async def stage(engine: EngineActor, model: Path) -> int:
    """The weights of a model directory as the next version, which is returned."""
    version = (await engine.load())["target_version"] + 1
    segment = model.parent / f"slipstream-test-{model.name}-{version}.safetensors"
    shutil.copy(model / "model.safetensors", segment)
    await engine.stage(version, str(segment), build_manifest(segment))
    return version


@pytest_asyncio.fixture(loop_scope="module")
async def served(engine: EngineActor, tmp_path: Path) -> Path:
    """Weights of its own for a test: what the engine serves when it begins."""
    model = QWEN2(tmp_path / "served", seed=5)
    version = await stage(engine, model)
    await engine.commit(version, PauseMode.KEEP)
    return model


def limit(monkeypatch: pytest.MonkeyPatch, engine: EngineActor, mib: int) -> None:
    changed = engine._spec.engine.model_copy(update={"load_ahead_mib": mib})
    spec = engine._weights._spec
    monkeypatch.setattr(engine._weights, "_spec", replace(spec, engine=changed))


async def test_what_is_ready_serves_nobody_before_the_commit_and_everybody_after_it(
    engine: EngineActor, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_loading, "SLICE_S", 0.0)  # steps after every module
    prompts = random_prompts(6, seed=21)
    new_model = QWEN2(tmp_path / "new", seed=6)
    await speculate(engine, 3)
    running = asyncio.create_task(generate(engine, prompts, greedy(300), name="meanwhile"))
    version = await stage(engine, new_model)
    assert set(await probe(engine, "ready_modules")) == {*BLOCK_MODULES, "model.norm"}
    old = await running
    assert [g[0].token_ids for g in old] == greedy_reference(served, prompts, 300)
    assert (await engine.audit(str(served))).different == []

    await engine.commit(version, PauseMode.KEEP)
    assert await probe(engine, "ready_modules") == []
    new = await generate(engine, prompts, greedy(24), name="after")
    assert [g[0].token_ids for g in new] == greedy_reference(new_model, prompts, 24)
    assert (await engine.audit(str(new_model))).different == []


async def test_only_what_changed_and_only_what_there_is_memory_for(
    engine: EngineActor, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_model = shutil.copytree(served, tmp_path / "new")
    tensors = load_file(served / "model.safetensors")
    changed = ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm")
    for name in changed:
        for number in (0, 1):
            whole = f"model.layers.{number}.{name}.weight"
            tensors[whole] = (tensors[whole].flip(0) * 1.5).contiguous()
    save_file(tensors, new_model / "model.safetensors", {"format": "pt"})
    block = sum(tensors[f"model.layers.0.{name}.weight"].nbytes for name in changed)
    monkeypatch.setattr(weight_loading, "MIB", block)  # room for one block
    limit(monkeypatch, engine, 1)
    version = await stage(engine, new_model)
    ready = await probe(engine, "ready_modules")
    assert {name.removeprefix("model.layers.0.") for name in ready} == set(changed)
    assert (await engine.audit(str(served))).different == []
    await engine.commit(version, PauseMode.KEEP)
    assert (await engine.audit(str(new_model))).different == []


async def test_nothing_is_made_ready_where_there_is_no_memory_for_it(
    engine: EngineActor, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, engine, 0)
    new_model = QWEN2(tmp_path / "new", seed=7)
    version = await stage(engine, new_model)
    assert await probe(engine, "ready_modules") == []
    await engine.commit(version, PauseMode.KEEP)
    assert (await engine.audit(str(new_model))).different == []


async def test_a_version_that_is_given_up_leaves_nothing(
    engine: EngineActor, served: Path, tmp_path: Path
) -> None:
    version = await stage(engine, QWEN2(tmp_path / "new", seed=8))
    assert await probe(engine, "ready_modules")
    await engine.discard(version)
    assert await probe(engine, "ready_modules") == []
    assert (await engine.audit(str(served))).different == []


async def test_what_is_given_up_in_the_middle_is_let_go_of(
    engine: EngineActor, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, engine, 0)
    version = await stage(engine, QWEN2(tmp_path / "new", seed=8))
    await probe(engine, "slipstream_begin_ahead", version, None, 1 << 30)
    assert not await probe(engine, "slipstream_ahead", 0.0), "one module, of many"
    await probe(engine, "hold_weakly")
    await engine.discard(version)
    assert await probe(engine, "is_let_go"), "memory and file are free without a collection"
    assert (await engine.audit(str(served))).different == []


async def test_going_back_has_nothing_to_make_ready(
    engine: EngineActor, served: Path, tmp_path: Path
) -> None:
    other = QWEN2(tmp_path / "other", seed=11)
    before = (await engine.load())["target_version"]
    await engine.load_weights(await stage(engine, other), PauseMode.KEEP)
    segment = tmp_path / "slipstream-test-before.safetensors"
    shutil.copy(served / "model.safetensors", segment)
    await engine.stage(before, str(segment), build_manifest(segment))
    assert await probe(engine, "ready_modules") == []
    await engine.load_weights(before, PauseMode.KEEP)
    await engine.resume()
    await engine.rebuild_drafter()
    assert (await engine.audit(str(served))).different == []


async def test_the_last_one_staged_is_the_one_that_is_ready(
    engine: EngineActor, served: Path, tmp_path: Path
) -> None:
    version = await stage(engine, QWEN2(tmp_path / "first", seed=8))
    other = QWEN2(tmp_path / "second", seed=9)
    segment = tmp_path / "slipstream-test-other.safetensors"
    shutil.copy(other / "model.safetensors", segment)
    await engine.stage(version + 1, str(segment), build_manifest(segment))
    await engine.commit(version, PauseMode.KEEP)  # the one before: all of it in the pause
    assert (await engine.audit(str(tmp_path / "first"))).different == []
    await engine.commit(version + 1, PauseMode.KEEP)
    assert (await engine.audit(str(other))).different == []


@pytest.mark.parametrize("name", ["0.self_attn.qkv_proj", "1.mlp.down_proj"])
async def test_a_module_that_cannot_be_loaded_stays_what_it_was_and_is_loaded_in_the_pause(
    engine: EngineActor, served: Path, tmp_path: Path, name: str
) -> None:
    prompts = random_prompts(4, seed=22)
    new_model = QWEN2(tmp_path / "new", seed=10)
    await probe(engine, "fail_at", f"model.layers.{name}")
    version = await stage(engine, new_model)
    assert f"model.layers.{name}" not in await probe(engine, "ready_modules")
    assert (await engine.audit(str(served))).different == []
    samples = await generate(engine, prompts, greedy(24), name=f"unharmed-{name}")
    assert [g[0].token_ids for g in samples] == greedy_reference(served, prompts, 24)
    await engine.commit(version, PauseMode.KEEP)
    assert (await engine.audit(str(new_model))).different == []
