"""Real engines shared by the whole session: starting one takes longer than most tests."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from rollout_server.engine.actor import EngineActor
from shared.types import DrafterScheme
from tests.support import proof
from tests.support.engine import PROBE, running_engine
from tests.support.models import make_model
from tests.support.proof_models import MODEL_MAKERS, SCHEMES, SelfDrafting


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


@pytest_asyncio.fixture(
    scope="session",
    loop_scope="session",
    params=itertools.product(MODEL_MAKERS, SCHEMES),
    ids=lambda param: f"{param[0]} {param[1]}",
)
async def self_drafting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SelfDrafting]:
    """Every architecture with every scheme, drafts of up to 8 tokens.

    All tests of one of them run one after the other, whatever their files: one start for all.
    """
    architecture, scheme = request.param
    model = MODEL_MAKERS[architecture](tmp_path_factory.mktemp(architecture), seed=0)
    async with running_engine(model, drafter={"scheme": scheme}, max_draft_length=8) as engine:
        yield SelfDrafting(
            engine=engine,
            model=model,
            name=f"{architecture} {scheme}",
            is_exact_drafter=scheme == DrafterScheme.NONE,
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """How each test of a long proof ended."""
    file, _, test = report.nodeid.partition("::")
    if "/test_proof_" in file and (report.when == "call" or report.failed):
        proof.record(
            "outcomes",
            f"{Path(file).name}::{test}",
            outcome=report.outcome,
            duration_s=round(report.duration, 1),
        )
