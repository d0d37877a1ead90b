"""kill -9 of the server in mid-request: nothing lost, nothing twice, every sample accounted for.

The long form is ``python -m tests.chaos.server_kills``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.server_kills import run


@pytest.mark.timeout(300)
async def test_clients_lose_nothing_and_get_nothing_twice_when_the_server_is_killed(
    tmp_path: Path,
) -> None:
    findings = await run(tmp_path, num_kills=8, num_clients=6, seed=7)
    assert findings.problems == []
    assert findings.num_kills == 9
    assert findings.num_delivered > 0
    assert findings.num_cancelled > 0
