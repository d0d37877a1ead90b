"""Engine states, arguments and what is left behind."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

from rollout_server.engine.arguments import EngineSpec, engine_environment, vllm_arguments
from rollout_server.engine.footprint import Footprint, own_footprint, remove_footprint
from rollout_server.engine.lifecycle import EngineLifecycle
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.types import ENGINE_TRANSITIONS, EngineState


@pytest.mark.parametrize("start", list(EngineState))
@pytest.mark.parametrize("end", list(EngineState))
def test_only_written_transitions_are_possible(start: EngineState, end: EngineState) -> None:
    lifecycle = EngineLifecycle()
    lifecycle._state = start
    if end in ENGINE_TRANSITIONS[start]:
        lifecycle.move(end)
        assert lifecycle.state is end
    else:
        with pytest.raises(ValueError, match="cannot go from"):
            lifecycle.move(end)


def test_the_first_cause_of_death_is_kept() -> None:
    lifecycle = EngineLifecycle()
    lifecycle.die("first")
    lifecycle.die("second")
    assert (lifecycle.state, lifecycle.error) == (EngineState.DEAD, "first")


def spec(index: int = 0, device: str = "cpu", **engine: object) -> EngineSpec:
    return EngineSpec(
        engine_id="engine-0",
        index=index,
        model=ModelConfig(path="/models/policy", max_model_len=256),
        engine=EngineConfig.model_validate(engine),
        drafter=DrafterConfig(),
        speculation=SpeculationConfig(num_speculative_tokens=2, max_num_speculative_tokens=6),
        device=device,
    )


def test_kv_slots_are_reserved_for_the_longest_draft_a_live_change_may_ask_for() -> None:
    arguments = vllm_arguments(spec(max_num_seqs=8))
    assert arguments["speculative_config"]["num_speculative_tokens"] == 6
    assert arguments["speculative_config"]["num_speculative_tokens_per_batch_size"] == [[1, 8, 6]]
    assert arguments["speculative_config"]["draft_sample_method"] == "probabilistic"


def test_logprobs_are_the_behaviour_policys() -> None:
    assert vllm_arguments(spec())["logprobs_mode"] == "processed_logprobs"


def test_cpu_engines_have_an_explicit_kv_budget_and_cuda_engines_a_share_of_the_gpu() -> None:
    assert vllm_arguments(spec())["kv_cache_memory_bytes"] == 1024**3
    assert "kv_cache_memory_bytes" not in vllm_arguments(spec(device="cuda"))
    assert vllm_arguments(spec(device="cuda"))["gpu_memory_utilization"] == 0.85


def test_a_cuda_engine_with_a_kv_budget_says_too_how_much_of_the_gpu_must_be_free() -> None:
    # vLLM's own default, 0.92, would keep a second engine off the same GPU.
    arguments = vllm_arguments(
        spec(device="cuda", kv_cache_memory_mib=64, gpu_memory_utilization=0.3)
    )
    assert arguments["kv_cache_memory_bytes"] == 64 * 1024**2
    assert arguments["gpu_memory_utilization"] == 0.3


def test_engines_take_core_lists_in_turn() -> None:
    cores = ["0", "1"]
    environments = [engine_environment(spec(index, cpu_cores=cores)) for index in range(3)]
    assert [e["VLLM_CPU_OMP_THREADS_BIND"] for e in environments] == ["0", "1", "0"]


def test_without_a_core_list_an_engine_may_use_every_core() -> None:
    assert engine_environment(spec())["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" not in engine_environment(spec(cpu_cores=["0"]))


def test_intel_openmp_is_preloaded_where_it_is_installed(tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libiomp5.so"
    assert "LD_PRELOAD" not in engine_environment(spec(), tmp_path)
    library.parent.mkdir()
    library.touch()
    assert engine_environment(spec(), tmp_path)["LD_PRELOAD"] == str(library)


def test_processes_that_do_not_end_are_killed_and_their_files_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rollout_server.engine.footprint.EXIT_TIMEOUT_S", 0.2)
    monkeypatch.setattr("rollout_server.engine.footprint.SHARED_MEMORY", tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    registration = tmp_path / f"__KMP_REGISTERED_LIB_{child.pid}_0"
    queue = tmp_path / "psm_0123"
    for file in (registration, queue):
        file.touch()
    create_time = psutil.Process(child.pid).create_time()
    remove_footprint(
        Footprint(processes=((child.pid, create_time),), shared_memory_files=(str(queue),))
    )
    assert child.wait(timeout=5) < 0
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_took_over_an_id_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.engine.footprint.EXIT_TIMEOUT_S", 0.1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        remove_footprint(Footprint(processes=((child.pid, 1.0),), shared_memory_files=()))
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=1)
    finally:
        child.kill()
        child.wait(timeout=5)


def test_what_is_on_another_host_is_not_looked_for_here(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    queue = tmp_path / "psm_0123"
    queue.touch()
    try:
        far = Footprint(
            processes=((child.pid, psutil.Process(child.pid).create_time()),),
            shared_memory_files=(str(queue),),
            place="another boot.1",
        )
        remove_footprint(far)
        assert child.poll() is None
        assert queue.exists()
    finally:
        child.kill()
        child.wait(timeout=5)


def test_a_footprint_knows_the_semaphores_and_queues_of_the_processes() -> None:
    context = multiprocessing.get_context("spawn")
    semaphore = context.Semaphore()
    memory = SharedMemory(create=True, size=64)
    try:
        files = own_footprint().shared_memory_files
        assert f"/dev/shm/{memory.name}" in files
        assert f"/dev/shm/sem.{semaphore._semlock.name.lstrip('/')}" in files  # type: ignore[attr-defined]
    finally:
        memory.close()
        memory.unlink()
