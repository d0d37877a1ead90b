"""A weight push on a real engine: new weights everywhere, old KV nowhere."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio

from rollout_server.engine import weight_loading
from rollout_server.engine.actor import EngineActor
from shared.errors import WeightVerificationError
from shared.types import PauseMode, SpeculationReason, TokenOrigin
from shared.weights import build_manifest
from tests.support.engine import generate, greedy, probe, push, running_engine, speculate
from tests.support.models import greedy_reference, make_model, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

DAMAGING = "tests.support.damage.DamagingExtension"
LONG_PROMPT = random_prompts(1, seed=9, longest=10)[0] * 30
"""Several full KV blocks, so that the prefix cache has something to offer."""


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=[True, False], ids=["tied", "untied"]
)
async def pushable(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[EngineActor, Path]]:
    """An engine of its own (a push changes it) with tied or separate embeddings."""
    path = make_model(tmp_path_factory.mktemp("pushable"), seed=3, tie=request.param)
    # int8 follows any model closely enough to tell a new drafter from an old one.
    async with running_engine(path, drafter={"scheme": "int8"}) as actor:
        yield actor, path


async def test_output_after_a_push_is_the_new_model_and_the_drafter_is_new_too(
    pushable: tuple[EngineActor, Path], tmp_path: Path
) -> None:
    engine, old_model = pushable
    prompts = [*random_prompts(10, seed=4), LONG_PROMPT]
    await speculate(engine, 3)
    old = await generate(engine, prompts, greedy(24), name="old")
    assert [g[0].token_ids for g in old] == greedy_reference(old_model, prompts, 24)

    is_tied = not (old_model / "model.safetensors").read_bytes().count(b"lm_head.weight")
    new_model = make_model(tmp_path / "new", seed=77, tie=is_tied)
    before = await engine.speculation(0)
    await push(engine, new_model, 1, tmp_path)
    new = await generate(engine, prompts, greedy(24), name="new")
    after = await engine.speculation(0)

    # LONG_PROMPT was in the prefix cache under the old weights.
    assert [g[0].token_ids for g in new] == greedy_reference(new_model, prompts, 24)
    assert {span.version for g in new for span in g[0].weight_versions} == {1}
    load = await engine.load()
    assert load["target_version"] == load["drafter_version"] == 1
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    drafted = after.num_draft_tokens - before.num_draft_tokens
    assert accepted / drafted > 0.5, "a drafter of the old weights would be rejected nearly always"
    for (sample,) in new:
        origins = sample.token_origins
        assert len(origins) == len(sample.token_ids)
        assert origins.count(TokenOrigin.ACCEPTED) == sample.num_accepted_tokens
        assert origins[0] == TokenOrigin.PLAIN, "the first comes of the prompt"
        assert TokenOrigin.UNKNOWN not in origins
    assert any(TokenOrigin.RECOVERED in sample.token_origins for (sample,) in new)


async def test_running_sequences_carry_on_and_say_which_tokens_are_whose(
    pushable: tuple[EngineActor, Path], tmp_path: Path
) -> None:
    engine, _ = pushable
    await speculate(engine, 0)
    version = (await engine.load())["target_version"] + 1
    running = asyncio.create_task(
        generate(engine, random_prompts(4, seed=5), greedy(400), name="running")
    )
    await until_running(engine, 4)
    await push(engine, pushable[1], version, tmp_path)
    for (sample,) in await running:
        spans = sample.weight_versions
        assert [span.version for span in spans] == [version - 1, version]
        assert spans[0].start == 0
        assert 0 < spans[0].end == spans[1].start < spans[1].end == len(sample.token_ids) == 400


async def until_running(engine: EngineActor, num_reqs: int) -> None:
    """Until so many requests run and have tokens: on a fast machine they do not run for long."""
    begun = (await engine.load())["num_generation_tokens"]
    load = {"num_running_reqs": 0, "num_generation_tokens": begun}
    while load["num_running_reqs"] < num_reqs or load["num_generation_tokens"] < begun + 8:
        await asyncio.sleep(0.005)
        load = await engine.load()


async def stage_new_weights(engine: EngineActor, like: Path, version: int, directory: Path) -> Path:
    """Other weights for a model of the same kind; where they are."""
    is_tied = not (like / "model.safetensors").read_bytes().count(b"lm_head.weight")
    new_model = make_model(directory / "new", seed=100 + version, tie=is_tied)
    segment = directory / "slipstream-test-new.safetensors"
    shutil.copy(new_model / "model.safetensors", segment)
    await engine.stage(version, str(segment), build_manifest(segment))
    return new_model


async def test_kept_sequences_can_go_on_as_if_the_new_model_had_read_them(
    pushable: tuple[EngineActor, Path], tmp_path: Path
) -> None:
    engine, model = pushable
    version = (await engine.load())["target_version"] + 1
    prompts = random_prompts(4, seed=15)
    new_model = await stage_new_weights(engine, model, version, tmp_path)
    await speculate(engine, 3)
    running = asyncio.create_task(generate(engine, prompts, greedy(300), name="recomputed"))
    await until_running(engine, len(prompts))
    await engine.commit(version, PauseMode.KEEP, recompute_kv=True)
    for prompt, (sample,) in zip(prompts, await running, strict=True):
        old, new = sample.weight_versions
        assert (old.version, new.version, new.end) == (version - 1, version, 300)
        assert 0 < new.start < 300
        read = [*prompt, *sample.token_ids[: new.start]]
        (expected,) = greedy_reference(new_model, [read], 300 - new.start)
        assert sample.token_ids[new.start :] == expected


async def test_the_drafter_is_rebuilt_beside_what_runs_and_drafts_nothing_until_it_is_done(
    pushable: tuple[EngineActor, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = pushable
    monkeypatch.setattr(weight_loading, "SLICE_S", 0.0)  # one block at a time
    version = (await engine.load())["target_version"] + 1
    await stage_new_weights(engine, model, version, tmp_path)
    await speculate(engine, 3)
    running = asyncio.create_task(
        generate(engine, random_prompts(2, seed=18), greedy(400), name="beside")
    )
    await until_running(engine, 2)
    await engine.load_weights(version, PauseMode.KEEP)
    await engine.resume()
    assert (await engine.load())["drafter_version"] < version
    (tmp_path / "slipstream-test-new.safetensors").unlink()  # as a push that leaves it out does
    await engine.rebuild_drafter()
    rebuilt = await engine.speculation(0)
    stale = [step for step in rebuilt.history if step.reason is SpeculationReason.STALE_DRAFTER]
    assert rebuilt.num_steps_per_reason[SpeculationReason.STALE_DRAFTER] >= 2, "between the blocks"
    assert {step.num_speculative_tokens for step in stale} == {0}
    assert (await engine.load())["drafter_version"] == version
    await running
    assert (await engine.speculation(0)).num_draft_tokens > rebuilt.num_draft_tokens
    assert (await engine.audit(str(tmp_path / "new"))).different == []


async def test_an_engine_goes_back_to_the_model_it_started_from(
    pushable: tuple[EngineActor, Path], tmp_path: Path
) -> None:
    engine, model = pushable
    prompts = random_prompts(4, seed=16)
    await stage_new_weights(engine, model, 1000, tmp_path)
    await engine.load_weights(1000, PauseMode.KEEP)
    await engine.stage_initial()
    await engine.load_weights(0, PauseMode.KEEP)
    timings = await engine.resume()
    assert timings.load_s > 0
    assert (await engine.rebuild_drafter()).requantize_s > 0
    await speculate(engine, 3)
    before = await engine.speculation(0)
    samples = await generate(engine, prompts, greedy(24), name="back")
    after = await engine.speculation(0)
    assert [g[0].token_ids for g in samples] == greedy_reference(model, prompts, 24)
    assert {span.version for g in samples for span in g[0].weight_versions} == {0}
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    assert accepted / (after.num_draft_tokens - before.num_draft_tokens) > 0.5


async def test_a_push_that_does_not_fit_the_model_is_refused_before_anything_changes(
    pushable: tuple[EngineActor, Path], tmp_path: Path
) -> None:
    engine, _ = pushable
    before = await engine.load()
    segment = tmp_path / "slipstream-test-bad.safetensors"
    shutil.copy(pushable[1] / "model.safetensors", segment)
    manifest = build_manifest(segment)
    short = manifest.model_copy(update={"tensors": manifest.tensors[1:]})
    with pytest.raises(WeightVerificationError, match="1 tensors missing"):
        await engine.stage(99, str(segment), short)
    assert (await engine.load())["target_version"] == before["target_version"]


async def test_a_drafter_may_lag_behind_as_far_as_it_is_allowed_to(tmp_path: Path) -> None:
    path = make_model(tmp_path / "start", seed=3)
    prompts = random_prompts(4, seed=11)
    lagging = {"scheme": "int8", "requantize_every": 2}
    async with running_engine(path, drafter=lagging) as engine:
        await speculate(engine, 3)
        versions = []
        for version in (1, 2, 3):
            new_model = make_model(tmp_path / f"new-{version}", seed=100 + version)
            await push(engine, new_model, version, tmp_path)
            before = await engine.speculation(0)
            groups = await generate(engine, prompts, greedy(24), name=f"v{version}")
            after = await engine.speculation(0)
            assert [g[0].token_ids for g in groups] == greedy_reference(new_model, prompts, 24)
            assert after.num_draft_tokens > before.num_draft_tokens, "it drafts all the while"
            versions.append((await engine.load())["drafter_version"])
    assert versions == [0, 2, 2]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_an_audit_finds_every_damaged_layer_and_nothing_else(
    tmp_path: Path, dtype: Literal["float32", "bfloat16"], scheme: str
) -> None:
    drafter = {"scheme": scheme, **({"int4_group_size": 32} if scheme == "int4" else {})}
    model = make_model(tmp_path / "model", seed=3)
    async with running_engine(
        model, dtype=dtype, drafter=drafter, worker_extension=DAMAGING
    ) as engine:
        intact = await engine.audit(str(model))
        assert intact.different == []
        assert intact.num_skipped == 0
        assert intact.num_equal > 20
        new_model = make_model(tmp_path / "new", seed=9)
        await push(engine, new_model, 1, tmp_path)
        assert (await engine.audit(str(new_model))).different == []
        assert len((await engine.audit(str(model))).different) > 10
        damaged: set[str] = set()
        for name, in_drafter in (
            ("model.layers.1.self_attn.qkv_proj", False),
            ("model.layers.0.mlp.down_proj", True),
            ("model.norm", False),
        ):
            await probe(engine, "damage", name, in_drafter)
            damaged.add(f"drafter {name}" if in_drafter else f"{name}.weight")
            assert set((await engine.audit(str(new_model))).different) == damaged
