"""Sampling ahead of training, over the whole loop: lag, resumes, stops, failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from shared.config.run import RunConfig
from shared.errors import SlipstreamError
from shared.schemas.rollouts import RolloutRequest
from shared.schemas.weights import PublishRequest
from tests.fakes.models import make_micro_model
from tests.fakes.policy_server import PolicyServer, serve_policy
from tests.support.trainer_runs import NUM_STEPS, records, run_config
from trainer.actor import TrainerActor
from trainer.status import TrainerPhase

NUM_PROMPTS = 4
LIMIT_S = 60.0
REPEATED = ("reward/mean", "loss/policy", "optimizer/grad_norm", "lag/max", "lag/mean")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro_model(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def server(model_path: Path, tmp_path: Path) -> Iterator[PolicyServer]:
    (tmp_path / "segments").mkdir()
    with serve_policy(model_path, tmp_path / "segments") as running:
        yield running
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("rollouts ")]
    assert left == []


def ahead_config(server: PolicyServer, model_path: Path, root: Path, **trainer: Any) -> RunConfig:
    return run_config(server, model_path, root, **{"batches_ahead": 1, **trainer})


def commits_wait(server: PolicyServer, steps: Mapping[int, int], *, num_posts: int = 1) -> None:
    """The commit of each version given comes when the batch of its step is sampled.

    So every batch is sampled as early as it can be: always from the same version.

    Args:
        num_posts: how often that batch has been asked for by then.
    """

    def is_whole(step: int) -> bool:
        posts = [name for name in all_ids(server) if name.endswith(f"/step={step}")]
        return len(posts) == num_posts and len(server.kept.get(posts[-1], ())) == NUM_PROMPTS

    def before_commit(push: PublishRequest) -> None:
        end_s = time.monotonic() + LIMIT_S
        while push.version in steps and not is_whole(steps[push.version]):
            assert time.monotonic() < end_s, f"step {steps[push.version]} is not sampled"
            time.sleep(0.005)

    server.before_commit = before_commit


def all_ids(server: PolicyServer) -> list[str]:
    return [str(request.request_id) for request in server.requests]


def training_ids(server: PolicyServer) -> list[str]:
    """Request ids of batches without the part that differs from process to process, sorted."""
    ids = (name.partition("/")[2] for name in all_ids(server))
    return sorted(name for name in ids if name.startswith("step="))


def pending_of(config: RunConfig, step: int) -> list[int]:
    path = config.run_dir / "checkpoints" / f"step-{step:06d}" / "trainer_state.json"
    return [batch["step"] for batch in json.loads(path.read_text())["pending"]]


def test_batches_are_sampled_while_steps_train_and_their_lag_is_measured(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    commits_wait(server, {1: 2, 2: 3, 3: 4})
    config = ahead_config(server, model_path, tmp_path)
    assert TrainerActor(config, resume=False).run() is TrainerPhase.FINISHED

    steps = records(config, "metrics.jsonl")[1:]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["weights/version"] for record in steps] == [1, 2, 3, 4]
    assert [record["lag/max"] for record in steps] == [0, 1, 1, 1]
    assert [record["lag/newest_version"] for record in steps] == [0, 0, 1, 2]
    assert [record["batch/num_stale"] for record in steps] == [0, 0, 0, 0]
    assert [record["rollout/num_groups_again"] for record in steps] == [0, 0, 0, 0]
    assert steps[1]["lag/num_samples_1"] == 16
    # The correction is between the weights that sampled and those that are trained.
    assert steps[0]["policy/mismatch_kl"] < 1e-6
    assert steps[0]["loss/importance_weight"] == pytest.approx(1.0, abs=1e-4)
    for record in steps[1:]:
        assert record["policy/mismatch_kl"] > 1e-6
        assert record.get("policy/max_logprob_diff") is None, "no sample of the same version"
    for sample in records(config, "rollouts.jsonl"):
        (span,) = sample["weight_versions"]
        assert span["version"] == max(0, sample["step"] - 2)
    assert training_ids(server) == ["step=1", "step=2", "step=3", "step=4"]
    assert server.aborted == []

    events = [(event["event"], event["step"]) for event in records(config, "events.jsonl")]
    for step in range(1, NUM_STEPS):
        # The next batch is asked for before the step trains.
        assert events.index(("rollout_start", step + 1)) < events.index(("train_start", step))
    assert [event for event in events if event[0] == "wait_end"] == [
        ("wait_end", step) for step in range(1, NUM_STEPS + 1)
    ]
    assert all(0 <= record["rollout/hidden_fraction"] <= 1 for record in steps)
    assert min(record["rollout/hidden_fraction"] for record in steps[1:]) > 0


def refuse_step_4(request: RolloutRequest) -> tuple[int, str] | None:
    return (400, "invalid_request") if str(request.request_id).endswith("/step=4") else None


def fail_in_step_4(server: PolicyServer, config: RunConfig) -> None:
    """Steps 1 to 3 are done, the last checkpoint is of step 2."""
    server.refuse_rollouts = refuse_step_4
    with pytest.raises(SlipstreamError, match="invalid_request"):
        TrainerActor(config, resume=False).run()
    server.refuse_rollouts = lambda request: None
    assert [push.version for push in server.pushes] == [1, 2, 3]
    assert pending_of(config, 2) == [3]


def test_a_resumed_run_trains_on_what_was_sampled_for_the_one_that_failed(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    commits_wait(server, {1: 2, 2: 3, 3: 4})
    whole = ahead_config(server, model_path, tmp_path / "whole")
    TrainerActor(whole, resume=False).run()
    expected = records(whole, "metrics.jsonl")

    (tmp_path / "other").mkdir()
    with serve_policy(model_path, tmp_path / "other") as other:
        config = ahead_config(other, model_path, tmp_path / "half")
        commits_wait(other, {1: 2, 2: 3})
        fail_in_step_4(other, config)
        # Version 4 is version 2 once more, and step 3 makes version 5.
        commits_wait(other, {5: 4}, num_posts=2)
        assert TrainerActor(config, resume=True).run() is TrainerPhase.FINISHED
        assert [push.version for push in other.pushes] == [1, 2, 3, 4, 5, 6]
        assert training_ids(other) == ["step=1", "step=2", *["step=3"] * 2, *["step=4"] * 2]
        third = {name for name in all_ids(other) if name.endswith("/step=3")}
        assert len(third) == 1, "fetched under its first id"

    found = records(config, "metrics.jsonl")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    for one, two in zip(expected, found, strict=True):
        for key in REPEATED:
            assert one.get(key) == two.get(key), (one["step"], key)
    assert found[3]["lag/newest_version"] == 1, "three numbers and one update behind"
    assert found[3]["batch/num_stale"] == found[3]["rollout/num_groups_again"] == 0


def test_a_resume_that_trains_nothing_leaves_its_checkpoint_as_it_is(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    commits_wait(server, {1: 2, 2: 3})
    config = ahead_config(server, model_path, tmp_path)
    fail_in_step_4(server, config)
    server.before_commit = lambda push: None
    directory = config.run_dir / "checkpoints" / "step-000002"
    files = {path: (path.stat().st_ino, path.read_bytes()) for path in directory.iterdir()}
    actor = TrainerActor(config, resume=True)
    server.before_commit = lambda push: actor.stop()  # when it has told the server its weights
    assert actor.run() is TrainerPhase.STOPPED
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in files} == files
    assert pending_of(config, 2) == [3]

    server.before_commit = lambda push: None
    assert TrainerActor(config, resume=True).run() is TrainerPhase.FINISHED


def test_a_server_that_has_forgotten_samples_the_batch_anew(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    config = ahead_config(server, model_path, tmp_path)
    fail_in_step_4(server, config)
    (tmp_path / "other").mkdir()
    with serve_policy(model_path, tmp_path / "other") as other:
        trainer = config.trainer.model_copy(update={"server_url": other.url})
        weights = config.weights.model_copy(update={"shared_memory_dir": str(tmp_path / "other")})
        moved = config.model_copy(update={"trainer": trainer, "weights": weights})
        assert TrainerActor(moved, resume=True).run() is TrainerPhase.FINISHED
        assert training_ids(other) == ["step=3", "step=4"]
    found = records(config, "metrics.jsonl")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    assert found[3]["lag/max"] == 0


def test_a_stop_ends_every_request_and_the_resumed_run_asks_anew(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    config = ahead_config(server, model_path, tmp_path)
    actor = TrainerActor(config, resume=False)
    both_asked = threading.Event()
    num_asked: list[int] = []

    def on_request(request: RolloutRequest) -> None:
        if "/step=" in str(request.request_id):
            server.hold.clear()
            num_asked.append(1)
        if len(num_asked) == 2:
            both_asked.set()

    server.refuse_rollouts = on_request
    outcomes: list[TrainerPhase] = []
    thread = threading.Thread(target=lambda: outcomes.append(actor.run()))
    thread.start()
    assert both_asked.wait(LIMIT_S)
    actor.stop()
    thread.join(LIMIT_S)
    assert outcomes == [TrainerPhase.STOPPED]
    assert {name.partition("/")[2] for name in server.aborted} == {"step=1", "step=2"}
    assert server.pushes == []
    assert pending_of(config, 0) == []

    server.refuse_rollouts = lambda request: None
    assert TrainerActor(config, resume=True).run() is TrainerPhase.FINISHED
    steps = [record["step"] for record in records(config, "metrics.jsonl")]
    # Both runs begin with an evaluation, as step 0.
    assert steps == [0, *range(NUM_STEPS + 1)]


def test_a_failing_rollout_ends_the_run_with_its_error_at_its_step(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    server.refuse_rollouts = lambda request: (
        (400, "invalid_request") if str(request.request_id).endswith("/step=3") else None
    )
    config = ahead_config(server, model_path, tmp_path, batches_ahead=2, max_policy_lag=2)
    actor = TrainerActor(config, resume=False)
    with pytest.raises(SlipstreamError, match="invalid_request"):
        actor.run()
    assert actor.status().phase is TrainerPhase.FAILED
    # What came before it is trained, pushed and checkpointed.
    assert [record["step"] for record in records(config, "metrics.jsonl")] == [0, 1, 2]
    assert [push.version for push in server.pushes] == [1, 2]
    assert list(server.segment_directory.iterdir()) == []
