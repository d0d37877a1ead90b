"""Settings of circuits, stragglers and the way to Ray that cannot work are refused."""

from __future__ import annotations

import pytest

from rollout_server.engine.cluster import start_or_join_cluster
from shared.config.loading import load_run_config
from shared.config.server import RayConfig
from shared.errors import ConfigurationError

MODEL = ["model.path=m"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("server.circuit_breaker.open_s=200", r"open_s 200 is above .*max_open_s 120"),
        ("server.circuit_breaker.num_failures=0", r"num_failures"),
        ("server.stragglers.patience=0.5", r"patience"),
        ("server.stragglers.max_samples=0", r"max_samples"),
        ("engine.node_poll_s=0", r"node_poll_s"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_run_config(None, [*MODEL, setting], {})


def test_late_samples_cannot_go_on_where_samples_of_dead_engines_start_over() -> None:
    both = ["server.stragglers.enabled=true", "server.dead_engine_policy=restart"]
    with pytest.raises(ConfigurationError, match="dead_engine_policy continue, not restart"):
        load_run_config(None, [*MODEL, *both], {})
    assert load_run_config(None, [*MODEL, both[0]], {}).server.stragglers.enabled
    assert not load_run_config(None, [*MODEL, both[1]], {}).server.stragglers.enabled


@pytest.mark.parametrize("address", ["ray://head:10001", "client://x"])
def test_ray_client_is_refused_with_the_reason_and_the_way_that_works(address: str) -> None:
    with pytest.raises(ConfigurationError, match=r"ray\.address.*Ray Client.*ray start"):
        load_run_config(None, [*MODEL, f"ray.address={address}"], {})
    for works in ("auto", "10.0.0.1:6379"):
        assert load_run_config(None, [*MODEL, f"ray.address={works}"], {}).ray.address == works


def test_auto_is_refused_where_the_environment_leads_through_ray_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigurationError, match=r"auto.*RAY_ADDRESS 'ray://head:10001'.*Client"):
        start_or_join_cluster(RayConfig(address="auto"))
