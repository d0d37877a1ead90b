"""A push of a few changed tensors to a real engine: only their modules are loaded again."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from rollout_server.engine.actor import EngineActor
from shared.types import PauseMode
from shared.weights import build_manifest
from tests.support.engine import generate, greedy, probe, running_engine, speculate
from tests.support.models import greedy_reference, make_model, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CHANGES = (
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.embed_tokens.weight",
)
"""A part of a fused layer, a whole one, a norm, and what a tied LM head shares."""


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[("int8", True), ("int4", False)],
    ids=["tied-int8", "untied-int4"],
)
async def pushable(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[EngineActor, Path]]:
    scheme, tie = request.param
    path = make_model(tmp_path_factory.mktemp("partial"), seed=3, tie=tie)
    drafter = {"scheme": scheme, **({"int4_group_size": 32} if scheme == "int4" else {})}
    async with running_engine(
        path, drafter=drafter, worker_extension="tests.support.damage.DamagingExtension"
    ) as actor:
        yield actor, path


async def push_tensors(
    engine: EngineActor, tensors: dict[str, torch.Tensor], directory: Path
) -> Path:
    """As the engine's next version; the file."""
    version = (await engine.load())["target_version"] + 1
    segment = directory / f"slipstream-test-{version}.safetensors"
    save_file(tensors, segment)
    await engine.stage(version, str(segment), build_manifest(segment))
    await engine.commit(version, PauseMode.KEEP)
    return segment


async def test_after_each_change_everything_is_that_of_the_new_version(
    pushable: tuple[EngineActor, Path], tmp_path: Path
) -> None:
    engine, model = pushable
    prompts = random_prompts(6, seed=21)
    tensors = load_file(model / "model.safetensors")
    await speculate(engine, 3)
    await push_tensors(engine, tensors, tmp_path)
    for number, name in enumerate((*CHANGES, "nothing")):
        if name in tensors:
            tensors[name] = (tensors[name].flip(0) * 1.5).contiguous()
        path = await push_tensors(engine, tensors, tmp_path)
        report = await engine.audit(str(path))
        assert report.different == [], name
        assert report.num_equal > 20
        new_model = shutil.copytree(model, tmp_path / f"model-{number}")
        shutil.copy(path, new_model / "model.safetensors")
        samples = await generate(engine, prompts, greedy(24), name=f"part-{report.version}")
        assert [g[0].token_ids for g in samples] == greedy_reference(new_model, prompts, 24), name
        versions = {span.version for g in samples for span in g[0].weight_versions}
        assert versions == {report.version}


async def test_what_a_push_does_not_touch_is_not_loaded_again(
    pushable: tuple[EngineActor, Path], tmp_path: Path
) -> None:
    """Damaged in memory, it stays so until a push changes it (or an audit replaces the engine)."""
    engine, model = pushable
    tensors = load_file(model / "model.safetensors")
    await push_tensors(engine, tensors, tmp_path)
    await probe(engine, "damage", "model.norm", False)
    await probe(engine, "damage", "model.layers.0.mlp.down_proj", True)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 0.5
    path = await push_tensors(engine, tensors, tmp_path)
    different = {"model.norm.weight", "drafter model.layers.0.mlp.down_proj"}
    assert set((await engine.audit(str(path))).different) == different
    tensors["model.norm.weight"] *= 1.25
    tensors["model.layers.0.mlp.down_proj.weight"] *= 0.5
    path = await push_tensors(engine, tensors, tmp_path)
    assert (await engine.audit(str(path))).different == []
