"""Bodies of ``/v1/rollouts`` and typed calls, for the API tests."""

from __future__ import annotations

from typing import Any

import httpx

from shared.schemas.rollouts import RolloutResponse, StreamLine


def body(request_id: str | None = None, num_prompts: int = 2, **more: object) -> dict[str, Any]:
    return {
        **({} if request_id is None else {"request_id": request_id}),
        "prompts": [
            {"prompt": f"q{index}", "answer": str(index), "metadata": {"id": index}}
            for index in range(num_prompts)
        ],
        "n": 2,
        "reward": {"name": "length"},
        **more,
    }


async def post(client: httpx.AsyncClient, request: dict[str, Any]) -> RolloutResponse:
    answer = await client.post("/v1/rollouts", json=request)
    assert answer.status_code == 200, answer.text
    return RolloutResponse.model_validate_json(answer.content)


async def lines(client: httpx.AsyncClient, request: dict[str, Any]) -> list[StreamLine]:
    answer = await client.post("/v1/rollouts", json={**request, "stream": True})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [StreamLine.model_validate_json(line) for line in answer.text.splitlines()]
