"""Trainers killed anywhere: no version is used twice, none is skipped, and they always go on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config.weights import WeightsConfig
from shared.errors import ConfigurationError, ConflictError
from shared.schemas.weights import PublishRequest, WeightsResponse
from tests.fakes.version_server import Fate, Killed, Restart, VersionServer, refusal
from trainer.policy import Policy
from trainer.publish import Publisher
from trainer.rollout_client import RolloutClient
from trainer.versions import (
    MAX_ROUNDS,
    Announced,
    VersionRecord,
    agree_on_version,
    version_to_start_with,
)


@pytest.mark.parametrize(
    ("committed", "last_used", "announced", "base", "checkpointed", "expected"),
    [
        (0, 0, 0, 0, None, None),  # both have the model directory
        (7, 7, 0, 0, None, 8),  # the server has another run's weights
        (0, 5, 0, 0, None, 6),  # the server lost another run's weights
        (0, 0, 0, 0, 0, 1),  # stopped before its first push
        (5, 5, 5, 4, 5, 6),  # an orderly end
        (5, 5, 6, 5, 3, 6),  # crashed before the server had version 6
        (6, 6, 6, 5, 3, 7),  # crashed after it was committed
        (0, 0, 6, 5, 3, 7),  # the server has forgotten
        (0, 6, 6, 5, 3, 7),  # it lost the weights, and knows
        (2, 2, 6, 5, 3, 7),  # it has forgotten, and somebody else pushed
        (2, 2, 0, 0, 3, 4),  # no note (an older run directory): the checkpoint tells
        (0, 0, 1, 0, None, 2),  # the first push was announced: it may have been committed
        (9, 9, 6, 5, 3, 10),  # somebody else pushed above
    ],
)
def test_the_first_version_is_one_more_than_committed_or_above_all_that_may_have_been(
    committed: int,
    last_used: int,
    announced: int,
    base: int,
    checkpointed: int | None,
    expected: int | None,
) -> None:
    status = WeightsResponse(
        committed_version=committed, last_version_used=last_used, engines=[], history=[]
    )
    note = Announced(version=announced, base_version=base)
    assert version_to_start_with(status, note, checkpointed) == expected


@dataclass(frozen=True, kw_only=True)
class Life:
    """A trainer from its start to its end."""

    fates: list[Fate]
    """Of its pushes, in order; it ends with the last one, or where one kills it."""
    checkpoint_every: int
    saves_last: bool
    """Whether it lives to write the checkpoint that is due after its last push."""
    then: Restart | None
    """What becomes of the server afterwards."""


lives = st.builds(
    Life,
    fates=st.lists(st.sampled_from(Fate), max_size=4),
    checkpoint_every=st.integers(1, 3),
    saves_last=st.booleans(),
    then=st.none() | st.sampled_from(Restart),
)


@dataclass
class World:
    """One run directory, one server, and the trainers that come and go."""

    directory: Path
    server: VersionServer = field(init=False)
    record: VersionRecord = field(init=False)
    saved: tuple[float, int] | None = None
    """The checkpoint: weights and their version."""
    num_updates: int = 0

    def __post_init__(self) -> None:
        self.server = VersionServer(self.directory)
        self.record = VersionRecord(self.directory / "announced.json")

    def live(self, life: Life) -> bool:
        """Whether the trainer agreed with the server on a version before it ended."""
        self.server.fates = list(life.fates)
        client = RolloutClient(
            "http://server",
            timeout_s=60,
            transport=httpx.MockTransport(self.server.answer),
            pause=lambda delay_s: None,
        )
        config = WeightsConfig(shared_memory_dir=str(self.directory))
        publisher = Publisher(client, config, announce=self.record.announce)
        model = torch.nn.Linear(1, 1, bias=False)
        weight, version = (0.0, None) if self.saved is None else self.saved
        torch.nn.init.constant_(model.weight, weight)
        policy = Policy(model, served_dtype=torch.float32, device=torch.device("cpu"))
        try:
            version = agree_on_version(client, publisher, policy, self.record, version)
        except Killed:
            return False
        assert version == self.server.committed_version
        try:
            while self.server.fates:
                # No two attempts at a step make the same weights.
                self.num_updates += 1
                torch.nn.init.constant_(model.weight, float(self.num_updates))
                publisher.publish(policy, version=version + 1, base_version=version)
                version += 1
                is_last = not self.server.fates
                if self.num_updates % life.checkpoint_every == 0 and (
                    life.saves_last or not is_last
                ):
                    self.saved = (float(model.weight.detach()), version)
        except Killed:
            pass
        return True


@settings(max_examples=300, deadline=None)
@given(st.lists(lives, min_size=1, max_size=6))
def test_wherever_trainers_and_servers_end_versions_go_on_one_by_one(story: list[Life]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        world = World(Path(directory))
        for life in story:
            world.live(life)
            if life.then is not None:
                world.server.restart(life.then)
        # The fake has checked that no version stands for two contents, over all restarts. A trainer
        # that nothing happens to always gets on:
        assert world.live(Life(fates=[], checkpoint_every=1, saves_last=True, then=None))
        for version, base in world.server.commits:
            assert version == base + 1 or base == 0
        # The same push may come to a server that forgot it, late: the same version once more.
        versions = [version for version, _ in world.server.commits]
        assert versions == sorted(versions)
        assert not list(Path(directory).glob("slipstream-*"))


@settings(max_examples=200, deadline=None)
@given(st.lists(lives, min_size=1, max_size=6), st.booleans())
def test_with_a_server_that_remembers_no_version_is_ever_skipped(
    story: list[Life], restarts: bool
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        world = World(Path(directory))
        # Version 1 is there: see the module's docstring for what a first push may cost.
        world.live(Life(fates=[Fate.ANSWERED], checkpoint_every=1, saves_last=True, then=None))
        for life in story:
            world.live(life)
            if restarts:
                world.server.restart(Restart.REMEMBERS)
        versions = [version for version, _ in world.server.commits]
        assert versions == list(range(1, len(versions) + 1))


def test_another_trainer_on_the_same_server_is_not_fought_for_ever(tmp_path: Path) -> None:
    versions = []
    committed = 3

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal committed
        if request.method == "GET":
            body = {"committed_version": committed, "engines": [], "history": []}
            return httpx.Response(200, json=body)
        versions.append(PublishRequest.model_validate_json(request.content).version)
        committed += 1
        return refusal(409, "conflict")

    client = RolloutClient("http://server", timeout_s=5, transport=httpx.MockTransport(answer))
    publisher = Publisher(client, WeightsConfig(shared_memory_dir=str(tmp_path)))
    cpu = torch.device("cpu")
    policy = Policy(torch.nn.Linear(1, 1), served_dtype=torch.float32, device=cpu)
    record = VersionRecord(tmp_path / "announced.json")
    with pytest.raises(ConflictError, match="another trainer"):
        agree_on_version(client, publisher, policy, record, None)
    assert versions == [4, 5, 6, 7, 8]
    assert len(versions) == MAX_ROUNDS


def test_a_note_survives_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "announced.json"
    record = VersionRecord(path)
    assert record.read() == Announced()
    record.announce(5, 4)
    assert VersionRecord(path).read() == Announced(version=5, base_version=4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["announced.json"]
    path.write_text("{")
    with pytest.raises(ConfigurationError, match=r"announced\.json"):
        record.read()
