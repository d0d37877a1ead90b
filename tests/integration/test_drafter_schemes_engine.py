"""Every scheme on a real engine: drafts are accepted, and the output is the target's alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import generate, greedy, running_engine, speculate
from tests.support.models import greedy_reference, make_model, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PROOF = os.environ.get("PROOF") == "1"
LONG_FORM = ("int4-asymmetric", "fp8", "none")
NUM_TOKENS = 40
SCHEMES: dict[str, tuple[dict[str, Any], float]] = {
    # settings, and a floor under the share of drafts accepted
    "int4": ({"scheme": "int4", "int4_group_size": 32}, 0.3),
    "int4-asymmetric": ({"scheme": "int4", "int4_symmetric": False}, 0.3),
    "fp8": ({"scheme": "fp8"}, 0.5),
    "none": ({"scheme": "none"}, 1.0),
}


@pytest.fixture(scope="module")
def uneven_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its 144 intermediate channels are no multiple of any int4 group: those layers are shared."""
    return make_model(tmp_path_factory.mktemp("uneven"), seed=0, intermediate_size=144)


@pytest.mark.parametrize("name", [name for name in SCHEMES if PROOF or name not in LONG_FORM])
async def test_greedy_output_is_the_targets_and_drafts_are_accepted(
    name: str, uneven_model: Path
) -> None:
    settings, floor = SCHEMES[name]
    prompts = random_prompts(12, seed=3)
    expected = greedy_reference(uneven_model, prompts, NUM_TOKENS)
    async with running_engine(uneven_model, drafter=settings) as engine:
        for num_speculative_tokens in (0, 3):
            await speculate(engine, num_speculative_tokens)
            results = await generate(
                engine, prompts, greedy(NUM_TOKENS), name=f"k{num_speculative_tokens}"
            )
            assert [samples[0].token_ids for samples in results] == expected
        num_drafted = sum(samples[0].num_draft_tokens for samples in results)
        num_accepted = sum(samples[0].num_accepted_tokens for samples in results)
    assert num_drafted > 0
    print(f"{name}: {num_accepted} of {num_drafted} drafts accepted")
    assert num_accepted < num_drafted or name == "none", "a rounded drafter is wrong now and then"
    assert num_accepted >= floor * num_drafted
