"""Settings of pools: what is left out is as under ``engine``, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.config.loading import dump_run_config, load_run_config, validate_run_config
from shared.config.model_support import check_model_support
from shared.config.run import RunConfig
from shared.errors import ConfigurationError
from shared.pool_types import PlacementStrategy

POOLS = [
    {"name": "small", "count": 4, "placement": {"node_labels": {"gpu": "l4"}}},
    {
        "name": "large",
        "count": 2,
        "max_count": 2,
        "tensor_parallel_size": 4,
        "kv_cache_memory_mib": 64,
        "placement": {"strategy": "spread", "node_ids": ["ab"], "resources": {"fast": 1}},
    },
]


def config(**engine: Any) -> RunConfig:
    return validate_run_config({"model": {"path": "m"}, "engine": engine})


def test_without_pools_there_is_one_with_the_counts_of_engine() -> None:
    engine = config(count=3, max_count=5, tensor_parallel_size=2).engine
    (pool,) = engine.all_pools
    assert (pool.name, pool.count, pool.max_count) == ("default", 3, 5)
    assert engine.of_pool(pool) == engine
    assert engine.total_count == 3


def test_a_pool_has_its_own_settings_and_those_of_engine() -> None:
    engine = config(pools=POOLS, max_num_seqs=7, kv_cache_memory_mib=32).engine
    small, large = (engine.of_pool(pool) for pool in engine.all_pools)
    assert engine.total_count == 6
    assert (small.count, small.tensor_parallel_size, small.kv_cache_memory_mib) == (4, 1, 32)
    assert (large.count, large.tensor_parallel_size, large.kv_cache_memory_mib) == (2, 4, 64)
    assert (small.max_num_seqs, large.max_num_seqs) == (7, 7)
    assert small.placement.node_labels == {"gpu": "l4"}
    assert small.placement.strategy is PlacementStrategy.PACK
    assert large.placement.strategy is PlacementStrategy.SPREAD


def test_pools_survive_being_written_and_read(tmp_path: Path) -> None:
    before = config(pools=POOLS)
    path = tmp_path / "config.yaml"
    path.write_text(dump_run_config(before), encoding="utf-8")
    after = load_run_config(path, environment={})
    assert after.engine.all_pools == before.engine.all_pools
    assert dump_run_config(after) == dump_run_config(before)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"pools": POOLS, "count": 2}, ["engine.count", "engine.pools", "each pool"]),
        ({"pools": POOLS, "max_count": 2}, ["engine.max_count", "engine.pools"]),
        ({"pools": [{"name": "a"}, {"name": "a"}]}, ["engine.pools", "a twice"]),
        ({"pools": [{"name": "A!"}]}, ["engine.pools.0.name", "A!"]),
        ({"pools": [{"name": "a", "count": 3, "max_count": 2}]}, ["count 3", "max_count 2"]),
        ({"pools": [{"name": "a", "max_num_seqs": 3}]}, ["max_num_seqs", "not permitted"]),
        ({"num_gpus": 1.5}, ["num_gpus 1.5", "whole"]),
        ({"num_gpus": 1, "tensor_parallel_size": 2}, ["num_gpus 1", "tensor_parallel_size 2"]),
        (
            {"num_gpus": 2, "pools": [{"name": "a", "tensor_parallel_size": 4}]},
            ["num_gpus 2", "pool a", "tensor_parallel_size 4"],
        ),
        ({"placement": {"resources": {"GPU": 1}}}, ["GPU", "num_gpus"]),
        ({"placement": {"resources": {"x": 0}}}, ["resource x 0"]),
        ({"placement": {"strategy": "scatter"}}, ["placement.strategy", "scatter"]),
        ({"restart_backoff_s": 90}, ["restart_backoff_s 90", "restart_max_backoff_s 60"]),
        ({"status_timeout_s": 60}, ["status_timeout_s", "60"]),
        (
            {"autoscaling": {"enabled": True, "min_count": 9, "max_count": 3}},
            ["min_count 9", "max_count 3"],
        ),
        (
            {"max_count": 4, "autoscaling": {"enabled": True, "max_count": 5}},
            ["max_count 5", "max_count 4"],
        ),
        ({"pools": POOLS, "autoscaling": {"enabled": True}}, ["engine.autoscaling.pool", "small"]),
        ({"autoscaling": {"pool": "b"}}, ["engine.autoscaling.pool 'b'", "default"]),
        (
            {"autoscaling": {"idle_share": 0.7, "kv_cache_high": 0.6}},
            ["idle_share 0.7", "kv_cache_high 0.6"],
        ),
    ],
)
def test_what_cannot_be_is_refused_with_value_and_setting(
    engine: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config(**engine)
    for word in words:
        assert word in caught.value.message


def test_a_model_must_fit_the_ranks_of_every_pool() -> None:
    settings = config(pools=[{"name": "a"}, {"name": "b", "tensor_parallel_size": 3}])
    model = {"model_type": "qwen3", "num_attention_heads": 8, "hidden_size": 64}
    with pytest.raises(ConfigurationError, match="tensor_parallel_size 3"):
        check_model_support(model, settings.engine, settings.drafter)
