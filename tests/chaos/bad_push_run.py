"""Sends damaged pushes to a real engine, and looks after each of them at what is served."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.local_engines import LocalHandle, LocalPool
from rollout_server.weights.commit_ledger import CommitLedger
from rollout_server.weights.coordinator import WeightCoordinator
from shared.clock import SystemClock
from shared.config.weights import WeightsConfig
from shared.errors import SlipstreamError
from shared.spare_segments import SPARE_PREFIX
from tests.chaos.bad_deltas import DELTA_KINDS
from tests.chaos.bad_pushes import KINDS
from tests.chaos.push_draft import Tensors, make_draft, read_tensors
from tests.support.engine import generate, greedy, running_engine, speculate
from tests.support.models import greedy_reference, make_model, random_prompts

ALL_KINDS = KINDS | DELTA_KINDS


@dataclass(kw_only=True, slots=True)
class BadPushCounts:
    """What a run adds up to."""

    sent: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """With the error of its kind."""
    otherwise: list[str] = field(default_factory=list)
    """Accepted, or refused with another error."""
    good: int = 0
    wrong_version_samples: int = 0
    leftovers: int = 0


async def run_bad_pushes(directory: Path, num_rounds: int) -> BadPushCounts:
    """Every kind of damage once a round; then a good push, and samples of it."""
    counts = BadPushCounts()
    shared_memory = directory / "shm"
    shared_memory.mkdir()
    # Without tied embeddings, so that every tensor of the file is one of the model.
    models = [make_model(directory / f"m{seed}", seed=seed, tie=False) for seed in (3, 4)]
    contents: list[Tensors] = [read_tensors(model / "model.safetensors") for model in models]
    prompts = random_prompts(3, seed=8)
    expected = [greedy_reference(model, prompts, 16) for model in models]
    async with running_engine(models[0], drafter={"scheme": "int8"}) as actor:
        config = WeightsConfig(shared_memory_dir=str(shared_memory), keep_on_stop=False)
        handle = LocalHandle("e0", actor, config)
        coordinator = WeightCoordinator(
            LocalPool([handle]),  # type: ignore[arg-type]  # only what pushes use
            config,
            SystemClock(),
            CommitLedger(directory / "state"),
        )
        await speculate(actor, 3)
        for number in range(num_rounds):
            version = number + 1
            good = make_draft(contents[version % 2], shared_memory, version, seed=0)
            # From the second version on only what changed is sent.
            await coordinator.publish(good.write() if version == 1 else good.write_delta())
            good.path.unlink()
            counts.good += 1
            files = {path.name for path in shared_memory.iterdir()}
            for index, kind in enumerate(ALL_KINDS):
                draft = make_draft(
                    contents[number % 2], shared_memory, version + 1, 1000 * number + index
                )
                damage, errors = ALL_KINDS[kind]
                request = damage(draft)
                counts.sent[kind] += 1
                try:
                    await coordinator.publish(request)
                except errors:
                    counts.refused[kind] += 1
                except SlipstreamError as exc:
                    counts.otherwise.append(f"{kind}: {exc!r}")
                else:
                    counts.otherwise.append(f"{kind}: accepted")
                draft.path.unlink(missing_ok=True)
                if not coordinator.committed_version == handle.committed_version == version:
                    counts.otherwise.append(f"{kind}: version {coordinator.committed_version}")
                now = {path.name for path in shared_memory.iterdir()}
                # A delta that is refused may have been written into the spare, which goes with it.
                lost = {name for name in files - now if not name.startswith(SPARE_PREFIX)}
                counts.leftovers += bool(now - files or lost)
            groups = await generate(actor, prompts, greedy(16), name=f"after-{number}")
            for (sample,), tokens in zip(groups, expected[version % 2], strict=True):
                versions = {span.version for span in sample.weight_versions or ()}
                if sample.token_ids != tokens or versions != {version}:
                    counts.wrong_version_samples += 1
            print(
                f"round {version}/{num_rounds}: {counts.refused.total()} of {counts.sent.total()} "
                "bad pushes refused",
                file=sys.stderr,
            )
        await coordinator.close()
    counts.leftovers += len(list(shared_memory.iterdir()))
    return counts
