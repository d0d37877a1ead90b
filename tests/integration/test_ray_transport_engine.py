"""Trainer, server and engine on two nodes of a Ray cluster: the pushed weights are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness.ray_nodes import TwoNodes, two_nodes
from shared.config.engine import ModelConfig
from shared.config.weights import WeightsConfig
from shared.types import TransportKind
from tests.support.models import greedy_reference, make_model, random_prompts
from tests.support.server_process import ServerProcess
from trainer.policy import Policy
from trainer.publish import Publisher
from trainer.rollout_client import RolloutClient

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STORE_BYTES = 128 << 20
NUM_TOKENS = 16


@pytest.fixture
def cluster() -> Iterator[TwoNodes]:
    """No engine fits on the server's node."""
    with two_nodes(STORE_BYTES, first_num_cpus=0, second_num_cpus=2) as nodes:
        yield nodes


def test_an_engine_on_another_node_serves_what_was_pushed(
    cluster: TwoNodes, tmp_path: Path
) -> None:
    shared_memory = tmp_path / "shm"
    shared_memory.mkdir()
    weights = WeightsConfig(
        transport=TransportKind.RAY, bucket_mib=1, shared_memory_dir=str(shared_memory)
    )
    old = make_model(tmp_path / "old", seed=3, intermediate_size=4096)
    new = make_model(tmp_path / "new", seed=77, intermediate_size=4096)
    prompts = random_prompts(4, seed=4)
    server = ServerProcess(
        tmp_path,
        old,
        {
            "ray": {"address": cluster.address},
            # A CPU, so that it goes where there are some.
            "engine": {"num_cpus": 1, "num_kv_blocks": 200, "block_size": 32, "max_num_seqs": 32},
            "weights": weights.model_dump(mode="json"),
        },
    )
    try:
        (engine,) = server.client.get("/v1/engines").json()["engines"]
        assert engine["node_id"] == cluster.second_id
        policy = Policy.load(
            new, ModelConfig(path=str(new), dtype="float32"), device=torch.device("cpu")
        )
        with RolloutClient(str(server.client.base_url), timeout_s=60) as client:
            report = Publisher(client, weights).publish(policy, version=1, base_version=0)
            assert report.num_bytes > 4 * weights.piece_bytes
        samples = server.greedy(prompts, NUM_TOKENS)
        assert [s["token_ids"] for s in samples] == greedy_reference(new, prompts, NUM_TOKENS)
        kinds = sorted(path.name.split("-")[1] for path in shared_memory.iterdir())
        assert kinds == ["node", "server", "server"], "a copy, the server's file and its claim"
        assert server.client.post("/v1/weights/audit", json={}).json()["is_intact"]
        server.stop()
        assert list(shared_memory.iterdir()) == []
    finally:
        server.kill()
