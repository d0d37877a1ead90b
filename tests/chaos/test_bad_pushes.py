"""Damaged, skewed and impossible pushes to a real engine: refused before anything changes.

Long form (``PROOF=1``): 600 of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.harness.local_engines import LocalHandle, LocalPool
from rollout_server.weights.commit_ledger import CommitLedger
from rollout_server.weights.coordinator import WeightCoordinator
from shared.clock import SystemClock
from shared.config.weights import WeightsConfig
from tests.chaos.bad_pushes import KINDS
from tests.chaos.push_draft import Tensors, make_draft, read_tensors
from tests.support.engine import generate, greedy, running_engine, speculate
from tests.support.models import greedy_reference, make_model, random_prompts
from tests.support.proof import IS_LONG

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROUNDS = 30 if IS_LONG else 2
"""Of every kind of damage; after each round a good push."""


async def test_no_damaged_push_is_ever_served(tmp_path: Path) -> None:
    shared_memory = tmp_path / "shm"
    shared_memory.mkdir()
    # Without tied embeddings, so that every tensor of the file is one of the model.
    models = [make_model(tmp_path / f"m{seed}", seed=seed, tie=False) for seed in (3, 4)]
    contents: list[Tensors] = [read_tensors(model / "model.safetensors") for model in models]
    prompts = random_prompts(3, seed=8)
    expected = [greedy_reference(model, prompts, 16) for model in models]
    refused: Counter[str] = Counter()
    async with running_engine(models[0], drafter={"scheme": "int8"}) as actor:
        config = WeightsConfig(shared_memory_dir=str(shared_memory), keep_on_stop=False)
        handle = LocalHandle("e0", actor, config)
        ledger = CommitLedger(tmp_path / "state")
        coordinator = WeightCoordinator(
            LocalPool([handle]),  # type: ignore[arg-type]  # only what pushes use
            config,
            SystemClock(),
            ledger,
        )
        await speculate(actor, 3)
        for number in range(ROUNDS):
            version = number + 1
            good = contents[(number + 1) % 2]
            good_push = make_draft(good, shared_memory, version, seed=0)
            await coordinator.publish(good_push.write())
            good_push.path.unlink()
            files = sorted(path.name for path in shared_memory.iterdir())
            for index, (kind, (damage, errors)) in enumerate(KINDS.items()):
                seed = 1000 * number + index
                draft = make_draft(contents[number % 2], shared_memory, version + 1, seed)
                request = damage(draft)
                with pytest.raises(errors):
                    await coordinator.publish(request)
                refused[kind] += 1
                draft.path.unlink(missing_ok=True)
                assert coordinator.committed_version == handle.committed_version == version
                assert sorted(path.name for path in shared_memory.iterdir()) == files
            samples = await generate(actor, prompts, greedy(16), name=f"after-{number}")
            assert [g[0].token_ids for g in samples] == expected[(number + 1) % 2]
            assert {s.version for g in samples for s in g[0].weight_versions} == {version}
        await coordinator.close()
    assert list(shared_memory.iterdir()) == []
    assert sum(refused.values()) == ROUNDS * len(KINDS)
