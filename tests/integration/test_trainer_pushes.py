"""The loop around its pushes: what runs beside them, and what stops, refusals and kills leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.errors import SlipstreamError
from shared.schemas.weights import PublishRequest
from tests.fakes.models import make_micro_model
from tests.fakes.policy_server import PolicyServer, serve_policy
from tests.support.trainer_runs import NUM_STEPS, checkpoints, records, run_config
from trainer.actor import TrainerActor
from trainer.status import TrainerPhase

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro_model(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def server(model_path: Path, tmp_path: Path) -> Iterator[PolicyServer]:
    (tmp_path / "segments").mkdir()
    with serve_policy(model_path, tmp_path / "segments") as running:
        yield running


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it came true in time."""
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


def test_a_checkpoint_is_written_while_the_server_takes_the_push_and_valid_only_afterwards(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    config = run_config(server, model_path, tmp_path, num_steps=2)
    directory = config.run_dir / "checkpoints"
    seen: list[tuple[int, bool, list[str]]] = []

    def before_commit(push: PublishRequest) -> None:
        is_written = push.version == 2 and wait_for(
            lambda: any(directory.glob(".partial-step-000002-*/optimizer.safetensors"))
        )
        names = [path.name for path in directory.glob("step-*")]
        seen.append((push.version, is_written, names))

    server.before_commit = before_commit
    assert TrainerActor(config, resume=False).run() is TrainerPhase.FINISHED
    assert seen == [(1, False, []), (2, True, [])]
    assert checkpoints(config) == {"step-000002": 2}


def test_refused_weights_are_in_no_checkpoint(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    config = run_config(server, model_path, tmp_path, checkpoint_every=1)

    def after_commit(push: PublishRequest) -> None:
        server.refuse_push = (422, "weight_verification_failed")

    server.after_commit = after_commit
    with pytest.raises(SlipstreamError, match="weight_verification_failed"):
        TrainerActor(config, resume=False).run()
    assert checkpoints(config) == {"step-000001": 1}
    assert list(server.segment_directory.iterdir()) == []


def test_a_stop_while_the_server_is_away_keeps_the_update_and_pushes_it_on_resume(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    config = run_config(server, model_path, tmp_path)
    actor = TrainerActor(config, resume=False)

    def before_commit(push: PublishRequest) -> None:
        if push.version == 2:
            actor.stop()
            raise ConnectionError

    server.before_commit = before_commit
    assert actor.run() is TrainerPhase.STOPPED
    assert checkpoints(config) == {"step-000002": 1}
    assert list(server.segment_directory.iterdir()) == []

    server.before_commit = lambda push: None
    assert TrainerActor(config, resume=True).run() is TrainerPhase.FINISHED
    pushed = [(push.version, push.base_version) for push in server.pushes]
    assert pushed == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert [record["step"] for record in records(config, "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_stop_during_a_push_waits_for_it(
    server: PolicyServer, model_path: Path, tmp_path: Path
) -> None:
    config = run_config(server, model_path, tmp_path)
    actor = TrainerActor(config, resume=False)
    server.before_commit = lambda push: actor.stop()
    assert actor.run() is TrainerPhase.STOPPED
    assert server.committed_version == 1
    assert checkpoints(config) == {"step-000001": 1}
    assert list(server.segment_directory.iterdir()) == []


@pytest.mark.parametrize(
    ("moment", "batches_ahead"), [("before_commit", 0), ("after_commit", 0), ("after_commit", 1)]
)
def test_a_trainer_killed_in_a_push_goes_on_with_the_next_version(
    server: PolicyServer, model_path: Path, tmp_path: Path, moment: str, batches_ahead: int
) -> None:
    config = run_config(server, model_path, tmp_path, batches_ahead=batches_ahead)
    path = tmp_path / "config.json"  # JSON is YAML
    path.write_text(json.dumps(config.model_dump(mode="json")))
    code = (
        "import sys; from shared.config.loading import load_run_config; "
        "from trainer.actor import TrainerActor; "
        "TrainerActor(load_run_config(sys.argv[1], []), resume=False).run()"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    is_killed = threading.Event()

    def kill(push: PublishRequest) -> None:
        if push.version == 3 and not is_killed.is_set():
            os.kill(trainer.pid, signal.SIGKILL)
            trainer.wait(LIMIT_S)
            is_killed.set()
            raise ConnectionError

    setattr(server, moment, kill)
    try:
        assert is_killed.wait(LIMIT_S)
    finally:
        trainer.kill()
        trainer.wait(LIMIT_S)
    assert len(list(server.segment_directory.iterdir())) == 1  # its owner is dead
    assert checkpoints(config) == {"step-000002": 2}

    assert TrainerActor(config, resume=True).run() is TrainerPhase.FINISHED
    versions = [push.version for push in server.pushes]
    # The checkpoint's weights first, then steps 3 and 4.
    assert versions == list(range(1, {"before_commit": 5, "after_commit": 6}[moment] + 1))
    assert all(push.base_version == push.version - 1 for push in server.pushes)
    found = records(config, "metrics.jsonl")
    assert [record["step"] for record in found] == list(range(NUM_STEPS + 1))
    assert all(record["lag/max"] <= batches_ahead for record in found[1:])
    # Ahead, step 3 was asked for before the checkpoint of step 2, and is fetched by its id.
    third = {r.request_id for r in server.requests if str(r.request_id).endswith("/step=3")}
    assert len(third) == 2 - batches_ahead
    assert list(server.segment_directory.iterdir()) == []
