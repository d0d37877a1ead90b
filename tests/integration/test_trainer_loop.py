"""The whole loop against a model behind real HTTP routes: files, pushes, resume, stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import ConfigurationError, SlipstreamError
from tests.fakes.models import make_micro_model
from tests.fakes.policy_server import PAUSED_S, PolicyServer, serve_policy
from tests.support.trainer_runs import NUM_STEPS, records, run_config
from trainer.actor import TrainerActor
from trainer.status import TrainerPhase


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro_model(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def segments(tmp_path: Path) -> Path:
    directory = tmp_path / "segments"
    directory.mkdir()
    return directory


@pytest.fixture
def server(model_path: Path, segments: Path) -> Iterator[PolicyServer]:
    with serve_policy(model_path, segments) as running:
        yield running


def test_training_learns_and_leaves_a_complete_record(
    server: PolicyServer, model_path: Path, segments: Path, tmp_path: Path
) -> None:
    config = run_config(server, model_path, tmp_path)
    actor = TrainerActor(config, resume=False)
    assert actor.run() is TrainerPhase.FINISHED

    metrics = records(config, "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(NUM_STEPS + 1))
    assert [record["step"] for record in metrics if "eval/accuracy" in record] == [0, 2, 4]
    steps = metrics[1:]
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"]
    assert [record["weights/version"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        # The server samples with what was pushed: the trainer's logprobs must be the same.
        assert record["policy/max_logprob_diff"] < 1e-4
        assert record["policy/mismatch_kl"] < 1e-6
        assert record["weights/paused_s"] == PAUSED_S
        assert record["rollout/num_draft_tokens"] == 4 * 4 * 4
        assert record["rollout/mean_acceptance_length"] == 2.5
        assert record["lag/max"] == record["rollout/hidden_fraction"] == 0

    rollouts = records(config, "rollouts.jsonl")
    assert len(rollouts) == NUM_STEPS * 16
    assert {record["step"] for record in rollouts} == {1, 2, 3, 4}
    assert rollouts[0]["weight_versions"][0]["version"] == 0
    assert rollouts[-1]["weight_versions"][0]["version"] == 3
    assert rollouts[0]["prompt"].endswith("=")

    events = [record["event"] for record in records(config, "events.jsonl")]
    one_step = [f"{phase}_{edge}" for phase in ("rollout", "train", "push") for edge in EDGES]
    assert events[:8] == ["eval_start", "eval_end", *one_step]
    decisions = [record["step"] for record in records(config, "speculation.jsonl")]
    assert decisions == list(range(1, len(decisions) + 1))

    assert list(segments.iterdir()) == []
    assert [push.version for push in server.pushes] == [1, 2, 3, 4]
    status = actor.status()
    assert (status.phase, status.step) == (TrainerPhase.FINISHED, NUM_STEPS)
    assert status.metrics["step"] == NUM_STEPS


EDGES = ("start", "end")


def test_a_resumed_run_repeats_what_an_uninterrupted_one_does(
    server: PolicyServer, model_path: Path, segments: Path, tmp_path: Path
) -> None:
    whole = run_config(server, model_path, tmp_path / "whole")
    TrainerActor(whole, resume=False).run()
    expected = records(whole, "metrics.jsonl")

    half = run_config(server, model_path, tmp_path / "half", num_steps=2)
    rest = run_config(server, model_path, tmp_path / "half")
    with serve_policy(model_path, segments) as other:
        update = {"server_url": other.url}
        half = half.model_copy(update={"trainer": half.trainer.model_copy(update=update)})
        TrainerActor(half, resume=False).run()
    # The server is a new one, at version 0: the resumed trainer gives it its own weights.
    with serve_policy(model_path, segments) as other:
        update = {"server_url": other.url}
        rest = rest.model_copy(update={"trainer": rest.trainer.model_copy(update=update)})
        assert TrainerActor(rest, resume=True).run() is TrainerPhase.FINISHED
        assert [push.version for push in other.pushes] == [3, 4, 5]
        assert other.pushes[0].base_version == 0

    found = records(rest, "metrics.jsonl")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    for one, two in zip(expected, found, strict=True):
        for key in ("reward/mean", "loss/policy", "optimizer/grad_norm", "eval/accuracy"):
            assert one.get(key) == two.get(key), key


def test_a_stop_during_rollouts_aborts_them_and_saves_a_checkpoint(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    config = run_config(server, model_path, tmp_path)
    actor = TrainerActor(config, resume=False)
    outcomes: list[TrainerPhase] = []
    server.hold.clear()
    thread = threading.Thread(target=lambda: outcomes.append(actor.run()))
    thread.start()
    assert server.first_group_sent.wait(60)
    assert actor.status().phase is TrainerPhase.EVAL
    actor.stop()
    thread.join(60)
    assert outcomes == [TrainerPhase.STOPPED]
    assert set(server.aborted) == {server.requests[0].request_id}
    assert (config.run_dir / "checkpoints" / "step-000000" / "trainer_state.json").exists()
    assert server.pushes == []

    assert TrainerActor(config, resume=True).run() is TrainerPhase.FINISHED
    assert [record["step"] for record in records(config, "metrics.jsonl")][-1] == NUM_STEPS


def test_a_refused_push_fails_the_run_and_leaves_no_segment(
    server: PolicyServer, model_path: Path, segments: Path, tmp_path: Path
) -> None:
    server.refuse_push = (422, "weight_verification_failed")
    actor = TrainerActor(run_config(server, model_path, tmp_path), resume=False)
    with pytest.raises(SlipstreamError, match="weight_verification_failed"):
        actor.run()
    assert actor.status().phase is TrainerPhase.FAILED
    assert list(segments.iterdir()) == []


def test_a_fresh_run_in_a_used_directory_is_refused(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    config = run_config(server, model_path, tmp_path, num_steps=0)
    TrainerActor(config, resume=False).run()
    with pytest.raises(ConfigurationError, match="--resume"):
        TrainerActor(config, resume=False).run()


def test_weights_the_server_already_has_are_pushed_over(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    server.committed_version = 7
    TrainerActor(run_config(server, model_path, tmp_path, num_steps=1), resume=False).run()
    assert [(push.base_version, push.version) for push in server.pushes] == [(7, 8), (8, 9)]
