"""File, environment and command line become one configuration, or one readable complaint."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config.loading import dump_run_config, load_run_config
from shared.errors import ConfigurationError

MODEL = ["model.path=some/model"]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_command_line_wins_over_environment_and_environment_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {path: m}\nengine: {count: 1, max_num_seqs: 3, seed: 5}\n")
    environment = {"SLIPSTREAM_ENGINE__COUNT": "2", "SLIPSTREAM_ENGINE__MAX_NUM_SEQS": "7"}
    config = load_run_config(path, ["engine.count=4"], environment)
    assert (config.engine.count, config.engine.max_num_seqs, config.engine.seed) == (4, 7, 5)


def test_values_on_the_command_line_are_yaml() -> None:
    config = load_run_config(None, [*MODEL, "engine.cpu_cores=['0', '1']", "demo_model=null"], {})
    assert config.engine.cpu_cores == ["0", "1"]
    assert config.demo_model is None


def test_installer_client_and_plugin_variables_are_not_settings() -> None:
    names = ("SLIPSTREAM_URL", "SLIPSTREAM_TORCH_INDEX_URL", "SLIPSTREAM_VLLM_PLUGIN", "HOME")
    environment = dict.fromkeys(names, "0")
    assert load_run_config(None, MODEL, environment).model.path == "some/model"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("engine.cuont=2", ["engine.cuont", "not permitted"]),
        ("engine.count=many", ["engine.count", "'many'"]),
        ("engine.count=100", ["engine.count 100", "engine.max_count 64"]),
        ("speculation.kv_cache_threshold=1.5", ["speculation.kv_cache_threshold", "1.5"]),
        ("speculation.kv_cache_threshold=0.01", ["kv_cache_hysteresis 0.05", "0.01"]),
        ("speculation.max_num_speculative_tokens=2", ["num_speculative_tokens 4", "2"]),
        ("drafter.enabled=false", ["speculation.mode adaptive", "drafter.enabled"]),
        ("model.max_model_len=200", ["trainer.sampling.max_tokens 256", "200"]),
        ("engine.vllm_args={seed: 1}", ["engine.vllm_args", "seed"]),
        ("trainer.task.kind=chess", ["trainer.task", "chess"]),
        ("engine.seed={}", ["engine.seed", "{}"]),
        ("engine.count.x=3", ["engine.count"]),
    ],
)
def test_a_wrong_setting_is_refused_with_key_and_value(override: str, parts: list[str]) -> None:
    needed = ["engine.count=1", "trainer.sampling.max_tokens=256"]
    overrides = [*MODEL, *needed, override]
    with pytest.raises(ConfigurationError) as caught:
        load_run_config(None, overrides, {})
    for part in parts:
        assert part in caught.value.message


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_run_config(None, [*MODEL, "engine.seed=x", "server.port=70000"], {})
    assert "engine.seed" in caught.value.message
    assert "server.port" in caught.value.message


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"model: Field required"):
        load_run_config(None, [], {})


def test_a_set_option_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="key=value"):
        load_run_config(None, ["engine.count"], {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.yaml"):
        load_run_config(tmp_path / "absent.yaml", [], {})


@pytest.mark.parametrize("text", ["model: [unclosed", "- a list"])
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.yaml"):
        load_run_config(write(tmp_path, text), [], {})


def test_the_dump_loads_back_to_the_same_configuration(tmp_path: Path) -> None:
    task = "trainer.task={kind: arithmetic, num_terms: [2, 6]}"
    overrides = [*MODEL, "speculation.mode=always", task]
    config = load_run_config(None, overrides, {})
    assert load_run_config(write(tmp_path, dump_run_config(config)), [], {}) == config


def test_a_short_context_without_sampling_settings_survives_the_dump(tmp_path: Path) -> None:
    config = load_run_config(None, [*MODEL, "model.max_model_len=200"], {})
    assert load_run_config(write(tmp_path, dump_run_config(config)), [], {}) == config


def test_the_configuration_cannot_be_changed_afterwards() -> None:
    config = load_run_config(None, MODEL, {})
    with pytest.raises(ValueError, match="frozen"):
        config.engine.count = 3  # type: ignore[misc]


def test_the_run_directory_is_output_dir_and_name() -> None:
    config = load_run_config(None, [*MODEL, "name=a", "output_dir=b"], {})
    assert config.run_dir == Path("b/a")


def test_two_buckets_fit_the_object_store_of_a_local_cluster() -> None:
    overrides = [*MODEL, "weights.transport=ray", "weights.bucket_mib=200"]
    with pytest.raises(
        ConfigurationError, match=r"object_store_mib 256 to 400 or more.*bucket_mib 200 to 128"
    ):
        load_run_config(None, overrides, {})
    load_run_config(None, [*overrides, "ray.object_store_mib=400"], {})
    # The nodes of a cluster that is joined are asked when the server starts.
    load_run_config(None, [*overrides, "ray.address=10.0.0.1:6379"], {})


def test_engines_that_join_wait_for_a_push_that_also_travels() -> None:
    here = load_run_config(None, MODEL, {}).weights
    far = load_run_config(None, [*MODEL, "weights.transport=ray", "ray.address=auto"], {}).weights
    travel_s = far.transfer_timeout_s + far.stage_timeout_s
    assert far.longest_push_s == here.longest_push_s + travel_s
    slower = here.model_copy(update={"rebuild_timeout_s": here.rebuild_timeout_s + 7})
    assert slower.longest_push_s == here.longest_push_s + 7, "drafters follow the push before"
