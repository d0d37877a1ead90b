"""What may be asked for and trained on, under every order of events; the age of versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.config.trainer import TrainerConfig
from shared.schemas.rollouts import WeightVersionSpan
from trainer.batch_plan import BATCH_TRANSITIONS, BatchPlan, BatchState, BatchTiming, PendingBatch
from trainer.policy_history import NUM_REVISIONS_KEPT, PolicyHistory


def plan(num_ahead: int, *, completed: int = 0, num_steps: int = 10) -> BatchPlan:
    return BatchPlan(completed_steps=completed, num_steps=num_steps, num_ahead=num_ahead)


def ask_all(batches: BatchPlan, now_s: float = 0.0) -> list[int]:
    due = list(batches.due())
    for step in due:
        batches.asked(step, f"id-{step}", now_s)
    return due


def complete(batches: BatchPlan, step: int) -> None:
    batches.arrived(step, 1.0)
    batches.taken(step, 2.0)
    batches.trained(step)


def test_by_turns_a_batch_is_due_when_the_one_before_is_trained() -> None:
    batches = plan(0, num_steps=2)
    assert ask_all(batches) == [1]
    batches.arrived(1, 1.0)
    batches.taken(1, 1.0)
    assert ask_all(batches) == []
    batches.trained(1)
    assert ask_all(batches) == [2]
    complete(batches, 2)
    assert ask_all(batches) == [], "nothing beyond the last step"


def test_ahead_the_next_batches_are_sampled_while_a_step_trains() -> None:
    batches = plan(2, num_steps=5)
    assert ask_all(batches) == [1, 2, 3]
    complete(batches, 1)
    assert ask_all(batches) == [4]
    complete(batches, 2)
    assert ask_all(batches) == [5]


def test_what_is_not_due_is_refused() -> None:
    batches = plan(1)
    with pytest.raises(ValueError, match="step 3 is not due with 0 steps completed"):
        batches.asked(3, "id", 0.0)
    ask_all(batches)
    with pytest.raises(ValueError, match="step 1 is not due"):
        batches.asked(1, "again", 0.0)
    batches.arrived(2, 1.0)
    with pytest.raises(ValueError, match="step 2 cannot follow step 0"):
        batches.taken(2, 1.0)
    with pytest.raises(ValueError, match="from asked to taken"):
        batches.taken(1, 1.0)


def test_every_state_has_its_transitions_and_the_ends_have_none() -> None:
    assert set(BATCH_TRANSITIONS) == set(BatchState)
    finals = {state for state, after in BATCH_TRANSITIONS.items() if not after}
    assert finals == {BatchState.TRAINED, BatchState.WITHDRAWN}


def test_a_checkpoint_has_what_is_asked_for_but_not_what_a_stop_ended() -> None:
    batches = plan(3)
    ask_all(batches)
    complete(batches, 1)
    batches.arrived(2, 1.0)
    batches.taken(2, 1.0)  # and no further: it is not trained on yet
    batches.withdrawn(3)
    expected = (PendingBatch(step=2, request_id="id-2"), PendingBatch(step=4, request_id="id-4"))
    assert batches.pending() == expected


@given(data=st.data(), num_ahead=st.integers(0, 4), num_steps=st.integers(0, 9))
def test_every_step_is_trained_on_once_in_order_and_no_batch_is_older_than_the_limit(
    data: st.DataObject, num_ahead: int, num_steps: int
) -> None:
    """Over arrivals in any order, steps that change nothing, and crashes that go back."""
    batches = plan(num_ahead, num_steps=num_steps)
    asked_at: dict[str, int] = {}  # request id -> steps completed when it was asked for
    states = {"completed": 0, "process": 0}
    trained: list[int] = []
    earlier: dict[int, str] = {}
    checkpoint: tuple[int, tuple[PendingBatch, ...]] = (0, ())
    num_crashes = data.draw(st.integers(0, 3))
    while states["completed"] < num_steps:
        for step in batches.due():
            assert step <= states["completed"] + 1 + num_ahead
            request_id = earlier.get(step, f"{states['process']}/{step}")
            asked_at.setdefault(request_id, states["completed"])
            batches.asked(step, request_id, 0.0)
        running = batches.asked_steps()
        step = states["completed"] + 1
        if running and (step in running or data.draw(st.booleans())):
            batches.arrived(data.draw(st.sampled_from(sorted(running))), 1.0)
        if step not in batches.asked_steps():
            request_id = next(b.request_id for b in batches.pending() if b.step == step)
            batches.taken(step, 1.0)
            assert states["completed"] - asked_at[request_id] <= num_ahead
            batches.trained(step)
            trained.append(step)
            states["completed"] = step
            if data.draw(st.booleans()):
                checkpoint = (step, batches.pending())
        if num_crashes and data.draw(st.booleans()):
            num_crashes -= 1
            states["process"] += 1
            states["completed"], pending = checkpoint
            earlier = {batch.step: batch.request_id for batch in pending}
            trained = trained[: states["completed"]]
            batches = plan(num_ahead, completed=states["completed"], num_steps=num_steps)
    assert trained == list(range(1, num_steps + 1))
    assert batches.pending() == ()


@given(
    asked_s=st.floats(0, 100),
    sampled_s=st.floats(0, 100),
    wanted_after_s=st.floats(0, 200),
    late_s=st.floats(0, 50),
)
def test_hidden_and_waited_time_add_up_to_the_sampling(
    asked_s: float, sampled_s: float, wanted_after_s: float, late_s: float
) -> None:
    arrived_s, wanted_s = asked_s + sampled_s, asked_s + wanted_after_s
    timing = BatchTiming(
        asked_s=asked_s,
        arrived_s=arrived_s,
        wanted_s=wanted_s,
        taken_s=max(arrived_s, wanted_s) + late_s,
    )
    hidden = timing.hidden_fraction
    if hidden is None:
        assert timing.sample_s <= 0
        return
    assert 0 <= hidden <= 1
    visible_s = timing.sample_s * (1 - hidden)
    assert timing.wait_s == pytest.approx(visible_s + late_s, abs=1e-6)


def test_a_batch_that_is_waited_for_from_the_start_hides_nothing() -> None:
    timing = BatchTiming(asked_s=5.0, arrived_s=9.0, wanted_s=5.0, taken_s=9.0)
    assert (timing.hidden_fraction, timing.wait_s) == (0.0, 4.0)
    early = BatchTiming(asked_s=5.0, arrived_s=9.0, wanted_s=8.0, taken_s=9.0)
    assert (early.hidden_fraction, early.wait_s) == (0.75, 1.0)


def test_batches_that_would_be_too_old_when_their_step_comes_are_refused() -> None:
    TrainerConfig(batches_ahead=2, max_policy_lag=2)
    with pytest.raises(ValidationError, match=r"batches_ahead 2 is above .*max_policy_lag 1"):
        TrainerConfig(batches_ahead=2)


def spans(*versions: int) -> list[WeightVersionSpan]:
    return [WeightVersionSpan(version=v, start=i, end=i + 1) for i, v in enumerate(versions)]


def test_the_lag_is_that_of_the_oldest_token_over_a_resume() -> None:
    history = PolicyHistory().served(4)
    for version in (5, 6):
        history = history.updated().served(version)
    resumed = history.served(8)  # 7 was pushed by the process that was killed, after its checkpoint
    now = resumed.updated().served(9)
    assert [now.lag_of(version) for version in (5, 6, 8, 9)] == [2, 1, 1, 0]
    assert now.lag(spans(9, 6, 8)) == 1
    assert now.lag(spans(9, 7)) is None, "nobody's weights any more"
    assert now.lag([]) == 0


def test_a_policy_that_was_changed_and_not_pushed_is_one_update_further() -> None:
    history = PolicyHistory().served(3).updated()  # a stop came while the server was away
    assert history.lag_of(3) == 1
    assert history.served(4).lag_of(4) == 0


def test_versions_of_long_ago_are_forgotten() -> None:
    history = PolicyHistory().served(0)
    for version in range(1, NUM_REVISIONS_KEPT + 50):
        history = history.updated().served(version)
    assert len(history.versions) <= NUM_REVISIONS_KEPT
    assert history.lag_of(0) is None
    assert history.lag_of(NUM_REVISIONS_KEPT + 48) == 1


@given(st.lists(st.sampled_from(["train", "checkpoint", "crash"]), max_size=40))
def test_a_lag_that_is_known_counts_the_updates_between_two_weights_of_one_line(
    events: list[str],
) -> None:
    """Against weights that are written out as the list of their updates."""
    weights: tuple[int, ...] = ()
    own: tuple[int, ...] = (0,)  # versions of this line, as far as it remembers
    history, version = PolicyHistory().served(0), 0
    stood_for: dict[int, tuple[int, ...]] = {0: ()}
    checkpoint = (weights, own, history)
    for number, event in enumerate(events):
        if event == "checkpoint":
            checkpoint = (weights, own, history)
            continue
        version += 1
        if event == "train":
            weights = (*weights, number)
            history = history.updated().served(version)
        else:
            weights, own, history = checkpoint
            history = history.served(version)
        own = (*own, version)
        stood_for[version] = weights
    for old, content in stood_for.items():
        lag = history.lag_of(old)
        assert (lag is not None) == (old in own)
        if lag is not None:
            assert weights[: len(content)] == content
            assert lag == len(weights) - len(content)
