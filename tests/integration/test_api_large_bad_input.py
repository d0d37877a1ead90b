"""Bodies with thousands of wrong values: refused at a bounded cost."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from tests.fakes.service import fake_service, running
from tests.integration.test_api_bad_input import (
    CHAT,
    COMPLETIONS,
    JSON,
    ROLLOUTS,
    SPECULATION,
    WEIGHTS,
    completion,
    rollout,
)

MANY = 100_000
MANY_WRONG: list[tuple[tuple[str, str], dict[str, Any]]] = [
    (ROLLOUTS, rollout(prompts=[{"prompt_token_ids": [0.5] * MANY}])),
    (ROLLOUTS, rollout(prompts=[{"messages": [0] * MANY}])),
    (ROLLOUTS, rollout(prompts=[0] * MANY)),
    (ROLLOUTS, rollout(sampling={"stop": [0] * MANY})),
    (ROLLOUTS, rollout(sampling={"stop_token_ids": [0.5] * MANY})),
    (COMPLETIONS, completion(prompt=[0.5] * MANY)),
    (COMPLETIONS, completion(prompt=[[0.5] * MANY])),
    (COMPLETIONS, completion(stop=[0] * MANY)),
    (CHAT, {"model": "tiny", "messages": [0] * MANY}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": [0] * MANY}]}),
    (WEIGHTS, {"manifest": {"segment": "slipstream-1.safetensors", "tensors": [0] * MANY}}),
    (SPECULATION, {"engine_ids": [0] * MANY}),
    # No list: counted, but not described.
    (SPECULATION, {f"x{number}": 1 for number in range(MANY)}),
]


@pytest.mark.parametrize(("route", "body"), MANY_WRONG)
async def test_a_body_with_nothing_right_in_it_costs_no_more_than_its_size(
    route: tuple[str, str], body: dict[str, Any]
) -> None:
    content = json.dumps(body)
    async with running(fake_service()) as client:
        tracemalloc.start()
        try:
            answer = await client.request(*route, content=content, headers=JSON)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert answer.status_code == 422
    assert len(answer.content) < 2000
    assert peak_bytes < 32 * len(content) + 2**20
