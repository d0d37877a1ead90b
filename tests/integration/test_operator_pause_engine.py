"""An operator's pause on a real engine: nothing is generated, and a push does not end it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from rollout_server.engine.actor import EngineActor
from shared.types import FinishReason, PauseMode
from shared.weights import build_manifest
from tests.support.engine import generate, greedy, running_engine, speculate
from tests.support.models import greedy_reference, make_model, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

STANDSTILL_S = 0.5
"""Long against a step of the tiny model (milliseconds)."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pausable(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[EngineActor, Path]]:
    path = make_model(tmp_path_factory.mktemp("pausable"), seed=3)
    async with running_engine(path, drafter={"scheme": "int8"}) as actor:
        await speculate(actor, 3)
        yield actor, path


async def num_tokens(engine: EngineActor) -> int:
    return int((await engine.load())["num_generation_tokens"])


async def is_standing_still(engine: EngineActor) -> bool:
    before = await num_tokens(engine)
    await asyncio.sleep(STANDSTILL_S)
    return await num_tokens(engine) == before


async def test_frozen_sequences_stand_still_and_finish_as_if_nothing_had_been(
    pausable: tuple[EngineActor, Path],
) -> None:
    engine, model = pausable
    prompts = random_prompts(4, seed=5)
    running = asyncio.create_task(generate(engine, prompts, greedy(300), name="frozen"))
    await asyncio.sleep(0.2)
    await engine.pause_generation(PauseMode.KEEP)
    assert await is_standing_still(engine)
    late = asyncio.create_task(generate(engine, prompts[:1], greedy(8), name="late"))
    assert await is_standing_still(engine)
    assert not late.done()
    assert not running.done()
    await engine.resume_generation()
    expected = greedy_reference(model, prompts, 300)
    assert [group[0].token_ids for group in await running] == expected
    assert (await late)[0][0].token_ids == expected[0][:8]


async def test_a_push_inside_a_pause_leaves_it_standing(
    pausable: tuple[EngineActor, Path], tmp_path: Path
) -> None:
    engine, _ = pausable
    running = asyncio.create_task(
        generate(engine, random_prompts(2, seed=6), greedy(300), name="through")
    )
    await asyncio.sleep(0.2)
    await engine.pause_generation(PauseMode.KEEP)
    new_model = make_model(tmp_path / "new", seed=77)
    segment = tmp_path / "slipstream-test-new.safetensors"
    shutil.copy(new_model / "model.safetensors", segment)
    await engine.stage(1, str(segment), build_manifest(segment))
    await engine.load_weights(1, PauseMode.KEEP)
    await engine.resume()
    assert await is_standing_still(engine)
    assert not running.done()
    await engine.resume_generation()
    for (sample,) in await running:
        assert [span.version for span in sample.weight_versions] == [0, 1]


async def test_wait_returns_when_what_ran_has_finished(
    pausable: tuple[EngineActor, Path],
) -> None:
    engine, _ = pausable
    running = asyncio.create_task(
        generate(engine, random_prompts(2, seed=7), greedy(200), name="waited-for")
    )
    await asyncio.sleep(0.1)
    await engine.pause_generation(PauseMode.WAIT)
    assert (await engine.load())["num_running_reqs"] == 0
    assert all(len(sample.token_ids) == 200 for (sample,) in await running)
    late = asyncio.create_task(generate(engine, random_prompts(1, seed=8), greedy(8), name="after"))
    assert await is_standing_still(engine)
    await engine.resume_generation()
    assert len((await late)[0][0].token_ids) == 8


async def test_abort_ends_what_ran_with_what_there_is(pausable: tuple[EngineActor, Path]) -> None:
    engine, _ = pausable
    running = asyncio.create_task(
        generate(engine, random_prompts(2, seed=9), greedy(400), name="ended")
    )
    await asyncio.sleep(0.1)
    await engine.pause_generation(PauseMode.ABORT)
    for (sample,) in await running:
        assert sample.finish_reason is FinishReason.ABORT
        assert 0 < len(sample.token_ids) < 400
    await engine.resume_generation()
