"""Real engines shared by the whole session: starting one takes longer than most tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from rollout_server.engine.actor import EngineActor
from tests.support.engine import PROBE, running_engine
from tests.support.models import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(tiny_model: Path) -> AsyncIterator[EngineActor]:
    """An engine serving ``tiny_model``, drafts of up to 5 tokens, speculation off."""
    async with running_engine(tiny_model) as actor:
        yield actor


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def proof_engine(tiny_model: Path) -> AsyncIterator[EngineActor]:
    """Serves ``tiny_model`` with drafts of up to 8 tokens and can be looked into (``probe``).

    Whoever plants an error in it takes it back.
    """
    async with running_engine(
        tiny_model,
        engine={"num_kv_blocks": 1200, "max_num_seqs": 256},
        max_draft_length=8,
        worker_extension=PROBE,
    ) as actor:
        yield actor
