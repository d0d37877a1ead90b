"""Two ranks under FSDP2 publish what one rank would; a failure of one ends both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.shard_rank import NUM_RANKS, VERSION, Tied, layouts
from trainer.publish import PIECE_BYTES

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0


def run_ranks(scenario: str, directory: Path) -> list[dict[str, Any]]:
    """What every rank of a scenario reports; {} of one that left no report."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.shard_rank", scenario]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(directory)],
            cwd=ROOT,
            env=environment,
            stderr=(directory / f"rank{rank}.err").open("wb"),
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        for rank, process in enumerate(ranks):
            code = process.wait(LIMIT_S)
            assert code == 0, (directory / f"rank{rank}.err").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.wait(10)
    reports = [directory / f"rank{rank}.json" for rank in range(NUM_RANKS)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in reports]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("equality")
    return directory, run_ranks("equality", directory)


@pytest.mark.parametrize("layout", sorted(layouts()))
def test_the_segment_from_shards_is_the_unsharded_one_byte_for_byte(
    published: tuple[Path, list[dict[str, Any]]], layout: str
) -> None:
    directory, reports = published
    assert (directory / f"{layout}.sharded").read_bytes() == (
        directory / "plain.whole"
    ).read_bytes()
    manifests = [
        json.loads((directory / name).read_text())["tensors"]
        for name in (f"{layout}.json", "plain.json")
    ]
    assert manifests[0] == manifests[1]
    assert [report[layout] for report in reports] == [VERSION] * NUM_RANKS


def test_the_segment_holds_every_weight_once_and_nothing_is_left_behind(
    published: tuple[Path, list[dict[str, Any]]],
) -> None:
    directory, reports = published
    found = load_file(directory / "by_layer.sharded")
    expected = dict(Tied().state_dict())
    del expected["head.weight"]  # tied to the embedding
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        served = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(found[name], served), name
    assert [report["left_over"] for report in reports] == [[], []]


def test_a_failure_of_the_writing_rank_ends_every_rank_with_its_message(tmp_path: Path) -> None:
    leader, follower = run_ranks("failing", tmp_path)
    assert "cannot be written" in leader["absent"]
    assert "weights.shared_memory_dir" in follower["absent"]
    assert follower["absent"].startswith("WeightTransferError: rank 0 did not publish")
    assert leader["half"] == "SlipstreamError: the disk is full"
    assert "the disk is full" in follower["half"]
    assert (leader["afterwards"], follower["afterwards"]) == (9, 9)


def test_a_rank_that_is_gone_ends_the_push_and_leaves_no_segment(tmp_path: Path) -> None:
    leader, _ = run_ranks("dying", tmp_path)
    assert leader["error"].startswith("WeightTransferError: rank 0 failed to")
    assert "rank 1" in leader["error"] or "rank [1]" in leader["error"]
    assert not list(tmp_path.glob("slipstream-*"))


@pytest.mark.slow
def test_a_push_holds_a_few_pieces_and_never_a_whole_tensor(tmp_path: Path) -> None:
    for report in run_ranks("memory", tmp_path):
        # A piece as it arrives, one as it is written, and what gloo and malloc keep.
        assert report["extra_bytes"] < 3 * PIECE_BYTES < report["served_bytes"]
