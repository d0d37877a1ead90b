"""Batches in threads beside the loop: order, fitness, fetching again, stops, failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shared.clock import SystemClock
from shared.config.trainer import TrainerConfig
from shared.errors import ConflictError, RequestError
from shared.schemas.rollouts import PromptItem, RolloutGroup, RolloutRequest, RolloutSample
from tests.support.rollout_stub import RolloutStub, group_of, groups_of
from trainer.batch_plan import PendingBatch
from trainer.batches import TrainingBatches
from trainer.policy_history import PolicyHistory
from trainer.recorder import RunRecorder
from trainer.sampling import RequestState, Sampler
from trainer.tasks import Problem

LIMIT_S = 20.0
NUM_PROMPTS = 3


def rollout_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rollouts ")]


class NumberedTask:
    """Prompts that name their batch and place."""

    def train_batch(self, step: int, count: int) -> Sequence[Problem]:
        return [
            Problem(prompt=f"{step}.{index}", answer=f"{step}.{index}") for index in range(count)
        ]

    def held_out(self, count: int) -> Sequence[Problem]:
        raise NotImplementedError


class Bench:
    """Batches over a stub, and the trainer's own view of versions."""

    def __init__(self, directory: Path, *, ahead: int = 0, num_steps: int = 4) -> None:
        self.directory = directory
        self.stub = RolloutStub(lambda request: groups_of(request, [0] * NUM_PROMPTS))
        self.stop = threading.Event()
        self.history = PolicyHistory().served(0)
        self.max_lag = 1
        self.sampler = Sampler(self.stub.client(self.stop), self.stop, SystemClock())
        self._config = TrainerConfig(
            prompts_per_step=NUM_PROMPTS,
            group_size=2,
            num_steps=num_steps,
            batches_ahead=ahead,
            max_policy_lag=max(ahead, 1),
        )
        self.batches = self.process("first")

    def process(
        self, run_id: str, *, completed: int = 0, pending: Sequence[PendingBatch] = ()
    ) -> TrainingBatches:
        """As a trainer makes them when it starts."""
        return TrainingBatches(
            sampler=self.sampler,
            task=NumberedTask(),
            recorder=RunRecorder(self.directory),
            config=self._config,
            clock=SystemClock(),
            run_id=run_id,
            completed_steps=completed,
            pending=pending,
        )

    def is_stale(self, sample: RolloutSample) -> bool:
        lag = self.history.lag(sample.weight_versions)
        return lag is None or lag > self.max_lag

    def settle(self) -> None:
        """Wait until no request runs any more."""
        for thread in rollout_threads():
            thread.join(LIMIT_S)

    def take(self, step: int, batches: TrainingBatches | None = None) -> list[RolloutGroup] | None:
        batches = batches or self.batches
        batches.ask()
        batch = batches.take(step, self.is_stale, lambda num_groups, num_expected: None)
        return None if batch is None else batch.groups


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, ahead=1)
    yield made
    made.stop.set()
    made.sampler.close()
    assert rollout_threads() == []


def versions_of(groups: Sequence[RolloutGroup] | None) -> list[int]:
    assert groups is not None
    return [group.samples[0].weight_versions[0].version for group in groups]


def test_groups_come_in_the_order_of_the_prompts_and_each_step_has_its_own(bench: Bench) -> None:
    groups = bench.take(1)
    assert [group.answer for group in groups or ()] == ["0.0", "0.1", "0.2"]
    bench.batches.trained(1)
    assert [group.answer for group in bench.take(2) or ()] == ["1.0", "1.1", "1.2"]
    bench.settle()
    assert sorted(bench.stub.request_ids) == ["first/step=1", "first/step=2", "first/step=3"]


def test_by_turns_nothing_of_the_sampling_is_hidden(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.batches.ask()
    batch = bench.batches.take(1, bench.is_stale, lambda num_groups, num_expected: None)
    assert batch is not None
    assert batch.timing.hidden_fraction == 0
    assert batch.timing.wait_s >= batch.timing.sample_s > 0


def test_groups_that_are_too_old_or_aborted_or_missing_are_sampled_again_once(
    bench: Bench,
) -> None:
    bench.history = PolicyHistory().served(5).updated().served(6).updated().served(7)

    def answer(request: RolloutRequest) -> Iterator[RolloutGroup]:
        if str(request.request_id).endswith("step=1"):
            yield group_of(0, version=6, answer="0.0")
            yield group_of(1, version=5, answer="0.1")  # two updates old
        else:
            yield from groups_of(request, [7] * len(request.prompts))

    bench.stub.answer = answer
    bench.batches.ask()
    batch = bench.batches.take(1, bench.is_stale, lambda num_groups, num_expected: None)
    assert batch is not None
    assert batch.num_groups_again == 2
    assert versions_of(batch.groups) == [6, 7, 7]
    assert [group.answer for group in batch.groups] == ["0.0", "0.1", "0.2"]
    assert [group.prompt_index for group in batch.groups] == [0, 1, 2]
    again = [r for r in bench.stub.requests if str(r.request_id).endswith("/again")]
    assert [item.prompt for item in again[0].prompts] == ["0.1", "0.2"]
    lines = (bench.directory / "rollouts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines if json.loads(line)["step"] == 1]
    assert sorted(prompts) == sorted(["0.0", "0.1", "0.1", "0.2"] * 2)


def test_what_is_unfit_a_second_time_is_handed_out_as_it_is(bench: Bench) -> None:
    bench.stub.answer = lambda request: (
        group_of(index, aborted=index == 0) for index in range(len(request.prompts))
    )
    groups = bench.take(1)
    assert [group.samples[0].finish_reason for group in groups or ()] == ["abort", "stop", "stop"]
    assert bench.stub.request_ids.count("first/step=1/again") == 1


def test_a_resumed_process_fetches_what_was_asked_for_and_asks_for_the_rest(bench: Bench) -> None:
    assert bench.take(1)
    bench.batches.trained(1)
    pending = bench.batches.pending()
    assert pending == (PendingBatch(step=2, request_id="first/step=2"),)
    bench.settle()
    resumed = bench.process("second", completed=1, pending=pending)
    assert bench.take(2, resumed)
    bench.settle()
    assert sorted(bench.stub.request_ids[2:]) == ["first/step=2", "second/step=3"]


def test_a_batch_whose_settings_have_changed_since_is_sampled_anew(bench: Bench) -> None:
    bench.stub.errors["first/step=1"] = 409, "conflict"
    pending = [PendingBatch(step=1, request_id="first/step=1")]
    groups = bench.take(1, bench.process("second", pending=pending))
    assert versions_of(groups) == [0, 0, 0]
    assert bench.stub.request_ids.count("second/step=1") == 1


def test_a_conflict_of_an_own_request_is_an_error(bench: Bench) -> None:
    bench.stub.errors["first/step=1"] = 409, "conflict"
    with pytest.raises(ConflictError):
        bench.take(1)


def test_a_failed_batch_raises_its_error_at_its_own_step(bench: Bench) -> None:
    bench.stub.errors["first/step=2"] = 400, "invalid_request"
    assert bench.take(1)
    bench.batches.trained(1)
    with pytest.raises(RequestError, match="no: invalid_request"):
        bench.take(2)


class Gate:
    """Answers with one group, and with the rest when it is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.has_begun = threading.Event()

    def __call__(self, request: RolloutRequest) -> Iterator[RolloutGroup]:
        yield group_of(0)
        self.has_begun.set()
        assert self.is_open.wait(LIMIT_S)
        for index in range(1, len(request.prompts)):
            yield group_of(index)


def test_what_an_earlier_process_asked_for_stays_pending_until_it_is_fetched(bench: Bench) -> None:
    earlier = [PendingBatch(step=step, request_id=f"first/step={step}") for step in (1, 2, 3, 4)]
    resumed = bench.process("second", completed=1, pending=earlier)
    assert resumed.pending() == tuple(earlier[1:]), "a stop may come before anything is asked for"
    bench.take(2, resumed)
    resumed.trained(2)
    assert resumed.pending() == tuple(earlier[2:]), "one ahead: step 4 is not asked for yet"


def test_a_stop_ends_the_wait_and_every_request_and_leaves_nothing_pending(bench: Bench) -> None:
    gate = Gate()
    bench.stub.answer = gate
    bench.batches.ask()
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(bench.take(1)))
    waiting.start()
    assert gate.has_begun.wait(LIMIT_S)
    bench.stop.set()
    bench.sampler.abort_all()
    waiting.join(LIMIT_S)
    assert found == [None]
    assert bench.batches.pending() == ()
    assert {"first/step=1", "first/step=2"} <= set(bench.stub.aborted)
    gate.is_open.set()


def test_what_has_arrived_stays_pending_through_a_stop(bench: Bench) -> None:
    bench.batches.ask()
    bench.settle()
    bench.stop.set()
    bench.sampler.abort_all()
    assert [batch.step for batch in bench.batches.pending()] == [1, 2]
    assert bench.stub.aborted == []


def test_an_abort_that_came_too_early_is_repeated_when_a_group_comes(tmp_path: Path) -> None:
    bench, gate = Bench(tmp_path), Gate()
    bench.stub.answer = gate
    prompts = [PromptItem(prompt="x"), PromptItem(prompt="y")]
    request = bench.sampler.start(
        RolloutRequest(request_id="a", stream=True, prompts=prompts), lambda group: None
    )
    assert gate.has_begun.wait(LIMIT_S)
    request.abort()
    assert bench.stub.aborted == ["a"]
    gate.is_open.set()
    assert request.join(LIMIT_S)
    assert bench.stub.aborted == ["a", "a"]
    assert (request.state, len(request.groups)) == (RequestState.ABORTED, 1)


def test_a_server_that_is_away_ends_the_retries_with_the_stop(bench: Bench) -> None:
    bench.stub.errors["first/step=1"] = 503, "unavailable"
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(bench.take(1)))
    waiting.start()
    while "first/step=1" not in bench.stub.request_ids:
        time.sleep(0.01)
    bench.stop.set()
    waiting.join(LIMIT_S)
    assert found == [None], "it neither failed nor waited on"


class HastyClock(SystemClock):
    """Every look at it is twenty seconds later."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic_s(self) -> float:
        self._now_s += 20.0
        return self._now_s


def test_a_thread_that_does_not_end_is_left_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate, stop = Gate(), threading.Event()
    sampler = Sampler(RolloutStub(gate).client(stop), stop, HastyClock())
    prompts = [PromptItem(prompt="x"), PromptItem(prompt="y")]
    request = RolloutRequest(request_id="a", stream=True, prompts=prompts)
    running = sampler.start(request, lambda group: None)
    assert gate.has_begun.wait(LIMIT_S)
    sampler.close()
    assert "rollouts a were aborted" in caplog.text
    gate.is_open.set()
    assert running.join(LIMIT_S)
