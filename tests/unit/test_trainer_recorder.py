"""The files of a run, the speculation log, and the metrics of a step."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.errors import ConfigurationError, UnavailableError
from shared.schemas.rollouts import RolloutGroup
from shared.schemas.speculation import SpeculationStep
from shared.types import FinishReason, RewardStatus, SpeculationReason
from tests.fakes.rollouts import rollout_group, rollout_sample
from trainer.batch_plan import BatchTiming
from trainer.collection import SampledBatch
from trainer.evaluation import evaluate_groups
from trainer.policy_history import PolicyHistory
from trainer.recorder import RunRecorder
from trainer.rollout_client import RolloutClient
from trainer.samples import select
from trainer.speculation_log import DraftCounts, SpeculationLog, mean_acceptance_length
from trainer.status import StatusBoard, TrainerPhase
from trainer.step_metrics import StepFacts, step_metrics


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_values_that_are_no_numbers_become_null(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path)
    recorder.metrics({"step": 1, "loss/policy": float("nan"), "reward/mean": float("inf")})
    (record,) = lines(tmp_path / "metrics.jsonl")
    assert record == {"step": 1, "loss/policy": None, "reward/mean": None}


def test_a_sample_is_written_with_its_origin(tmp_path: Path) -> None:
    group = rollout_group(samples=[rollout_sample(2, reward=0.5, text="ans=4")], answer="4")
    RunRecorder(tmp_path).rollouts(7, group, "2+2=")
    (record,) = lines(tmp_path / "rollouts.jsonl")
    assert record["id"] == "group=0/sample=2"
    assert (record["step"], record["prompt"], record["completion"]) == (7, "2+2=", "ans=4")
    assert record["weight_versions"] == [{"version": 0, "start": 0, "end": 3}]
    assert (record["finish_reason"], record["engine_id"]) == ("stop", "engine-0")
    assert (record["num_draft_tokens"], record["num_accepted_tokens"]) == (4, 2)


def test_a_span_ends_even_when_its_work_fails(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path)
    with pytest.raises(RuntimeError), recorder.span("push", 3):
        raise RuntimeError
    events = lines(tmp_path / "events.jsonl")
    assert [(event["event"], event["step"]) for event in events] == [
        ("push_start", 3),
        ("push_end", 3),
    ]


def test_a_resume_drops_the_steps_it_will_repeat_and_half_a_line(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path)
    for step in range(5):
        recorder.metrics({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "cut')
    recorder.prepare(resume_after_step=2)
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_fresh_run_does_not_mix_into_an_old_one(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path)
    recorder.prepare(resume_after_step=None)
    recorder.metrics({"step": 1})
    with pytest.raises(ConfigurationError, match="another name"):
        recorder.prepare(resume_after_step=None)


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path)

    def write(thread: int) -> None:
        for step in range(50):
            recorder.metrics({"step": step, "thread": thread})

    threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(tmp_path / "metrics.jsonl")) == 200


class SpeculationServer:
    """Engines with numbered decisions; answers as ``since_step`` asks."""

    def __init__(self) -> None:
        self.latest: dict[str, int] = {}
        self.is_up = True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not self.is_up:
            raise httpx.ConnectError("refused")
        since = int(request.url.params["since_step"])
        engines = [self._engine(name, since, latest) for name, latest in self.latest.items()]
        policy = {
            "mode": "kv_gate",
            "num_speculative_tokens": 2,
            "kv_cache_threshold": 0.5,
            "kv_cache_hysteresis": 0.0,
            "min_dwell_steps": 0,
        }
        body = {"policy": policy, "max_num_speculative_tokens": 2, "engines": engines}
        return httpx.Response(200, json=body)

    def _engine(self, name: str, since: int, latest: int) -> dict[str, Any]:
        history = [
            SpeculationStep(
                step=step,
                time_s=float(step),
                kv_cache_usage=0.1,
                num_running_reqs=1,
                num_waiting_reqs=0,
                num_speculative_tokens=2,
                reason=SpeculationReason.BELOW_THRESHOLD,
            ).model_dump(mode="json")
            for step in range(since + 1, latest + 1)
        ]
        return {
            "engine_id": name,
            "enabled": True,
            "num_speculative_tokens": 2,
            "reason": "below_threshold",
            "kv_cache_usage": 0.1,
            "num_steps": latest,
            "num_steps_on": latest,
            "num_switches": 0,
            "num_drafts": latest,
            "num_draft_tokens": 2 * latest,
            "num_accepted_tokens": latest,
            "num_accepted_tokens_per_pos": [latest, 0],
            "mean_acceptance_length": 2.0,
            "history": history,
        }


def speculation_log(tmp_path: Path, server: SpeculationServer) -> SpeculationLog:
    client = RolloutClient("http://x", timeout_s=5, transport=httpx.MockTransport(server))
    return SpeculationLog(client, RunRecorder(tmp_path))


def test_every_decision_of_every_engine_is_written_once(tmp_path: Path) -> None:
    server = SpeculationServer()
    log = speculation_log(tmp_path, server)
    server.latest = {"engine-0": 3}
    log.poll()
    server.latest = {"engine-0": 6, "engine-1": 2}  # a new one, seen with since_step 3
    log.poll()
    server.latest = {"engine-0": 9, "engine-1": 5}
    log.poll()
    server.latest = {"engine-1": 8}  # the first is gone
    log.poll()
    written: dict[str, list[int]] = {"engine-0": [], "engine-1": []}
    for record in lines(tmp_path / "speculation.jsonl"):
        written[record["engine_id"]].append(record["step"])
    assert written == {"engine-0": list(range(1, 10)), "engine-1": list(range(1, 9))}


def test_the_log_survives_an_outage(tmp_path: Path) -> None:
    server = SpeculationServer()
    server.latest = {"engine-0": 1}
    server.is_up = False
    log = speculation_log(tmp_path, server)
    with pytest.raises(UnavailableError):
        log.poll()
    with log:
        server.is_up = True
        waiting = threading.Event()
        for _ in range(1000):
            if (tmp_path / "speculation.jsonl").exists():
                break
            waiting.wait(0.02)
    assert [record["step"] for record in lines(tmp_path / "speculation.jsonl")] == [1]


def counts(num_drafts: int, num_accepted: int) -> DraftCounts:
    return DraftCounts(
        num_drafts=num_drafts, num_draft_tokens=2 * num_drafts, num_accepted_tokens=num_accepted
    )


def test_acceptance_is_that_of_the_step_and_includes_the_bonus_token() -> None:
    before = {"a": counts(10, 10)}
    assert mean_acceptance_length(before, {"a": counts(20, 25)}) == 2.5
    assert mean_acceptance_length(before, {"a": counts(20, 25), "b": counts(10, 0)}) == 1.75
    assert mean_acceptance_length(before, before) is None


def batch(groups: list[RolloutGroup]) -> SampledBatch:
    """Asked for at 10 s, there at 12 s, wanted from 11.5 s on."""
    timing = BatchTiming(asked_s=10.0, arrived_s=12.0, wanted_s=11.5, taken_s=12.0)
    return SampledBatch(groups=groups, timing=timing, num_groups_again=1)


def facts(groups: list[RolloutGroup], **changes: Any) -> StepFacts:
    values: dict[str, Any] = {
        "step": 5,
        "time_s": 100.0,
        "duration_s": 3.0,
        "batch": batch(groups),
        "selection": select(groups),
        "history": PolicyHistory().served(0),
        "update": None,
        "push": None,
        "weight_version": 4,
        "draft_counts_before": {},
        "draft_counts_after": {"engine-0": counts(6, 6)},
    }
    return StepFacts(**values | changes)


def test_the_metrics_say_how_old_the_policy_of_the_samples_was() -> None:
    history = PolicyHistory().served(4).updated().served(5).updated().served(6)
    versions = [4, 5, 5, 9]
    samples = [rollout_sample(i, reward=1.0, version=v) for i, v in enumerate(versions)]
    record = step_metrics(facts([rollout_group(samples=samples)], history=history))
    assert record["lag/max"] == 2
    assert record["lag/mean"] == pytest.approx(4 / 3)
    assert (record["lag/num_samples_1"], record["lag/num_samples_2"]) == (2, 1)
    assert record["lag/num_unknown"] == 1
    assert (record["lag/oldest_version"], record["lag/newest_version"]) == (4, 9)


def test_the_metrics_say_how_long_the_trainer_waited_and_what_it_hid() -> None:
    record = step_metrics(facts([rollout_group(samples=[rollout_sample(0, reward=1.0)])]))
    assert record["phase/rollout_s"] == 0.5
    assert record["rollout/sample_s"] == 2.0
    assert record["rollout/hidden_fraction"] == 0.75
    assert record["rollout/tokens_per_s"] == 1.5
    assert (record["step/duration_s"], record["step/tokens_per_s"]) == (3.0, 1.0)
    assert record["rollout/num_groups_again"] == 1


def test_the_metrics_of_a_step_without_signal_have_no_loss_and_no_push() -> None:
    samples = [
        rollout_sample(0, reward=1.0, token_ids=[1, 2, 3]),
        rollout_sample(1, reward=1.0, token_ids=[1], finish_reason=FinishReason.LENGTH),
        rollout_sample(2, reward=None, reward_status=RewardStatus.ERROR, token_ids=[1, 2]),
    ]
    groups = [rollout_group(samples=samples)]
    record = step_metrics(facts(groups))
    assert record["reward/mean"] == 1.0
    assert record["reward/std"] == 0.0
    assert record["rollout/tokens_per_s"] == 3.0
    assert record["rollout/mean_completion_tokens"] == 2.0
    assert record["rollout/max_completion_tokens"] == 3
    assert record["rollout/truncated_fraction"] == pytest.approx(1 / 3)
    assert record["rollout/mean_acceptance_length"] == 2.0
    assert record["batch/num_unscored"] == 1
    assert record["batch/num_groups_without_signal"] == 1
    assert record["weights/version"] == 4
    assert not {key for key in record if key.startswith(("loss/", "policy/", "weights/push"))}


def test_accuracy_counts_full_rewards_and_failed_ones_as_wrong() -> None:
    samples = [
        rollout_sample(0, reward=1.0),
        rollout_sample(1, reward=0.5),
        rollout_sample(2, reward=None, reward_status=RewardStatus.TIMEOUT),
        rollout_sample(3, reward=1.0),
    ]
    result = evaluate_groups([rollout_group(samples=samples)])
    assert (result.accuracy, result.mean_reward, result.num_unscored) == (0.5, 0.625, 1)
    with pytest.raises(ValueError, match="at least one"):
        evaluate_groups([])


def test_the_board_keeps_the_last_metrics_through_later_phases() -> None:
    board = StatusBoard(num_steps=9)
    board.completed(1, 1, {"step": 1, "reward/mean": 0.5})
    board.enter(TrainerPhase.ROLLOUT)
    board.groups(3, 8)
    status = board.read()
    assert (status.phase, status.step, status.num_steps) == (TrainerPhase.ROLLOUT, 1, 9)
    assert (status.num_groups, status.num_groups_expected) == (3, 8)
    assert status.metrics["reward/mean"] == 0.5
    board.enter(TrainerPhase.TRAIN)
    assert board.read().num_groups == 0
