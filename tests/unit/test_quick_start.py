"""What vLLM's processes begin with, and that collections are as usual once they have begun."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from rollout_server.engine.quick_start import (
    MAIN_MODULE,
    RARE_THRESHOLD,
    collect_as_usual,
    collect_rarely,
    rare_collections,
    spawning_lightly,
)
from rollout_server.engine.vllm_plugin import DISABLE_VARIABLE, register


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    collect_as_usual()
    assert gc.get_threshold() == before


def test_collections_are_rare_during_an_import_also_when_it_fails(
    usual: tuple[int, int, int],
) -> None:
    with rare_collections():
        assert gc.get_threshold() == (RARE_THRESHOLD, *usual[1:])
        assert gc.isenabled()
    assert gc.get_threshold() == usual
    with pytest.raises(ImportError), rare_collections():
        raise ImportError
    assert gc.get_threshold() == usual


def test_asked_for_twice_they_still_come_back(usual: tuple[int, int, int]) -> None:
    collect_rarely()
    collect_rarely()
    collect_as_usual()
    assert gc.get_threshold() == usual
    collect_as_usual()
    assert gc.get_threshold() == usual


def test_the_plugin_ends_it_in_vllms_processes_even_where_it_changes_nothing_else(
    monkeypatch: pytest.MonkeyPatch, usual: tuple[int, int, int]
) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, "0")
    collect_rarely()
    register()
    assert gc.get_threshold() == usual


def facts(sender: Connection, generations: int) -> None:
    """Runs in a spawned process: its main module, its threshold, and those of its own child."""
    main = sys.modules["__main__"]
    name = main.__spec__.name if main.__spec__ is not None else ""
    told = [(name, gc.get_threshold()[0])]
    if generations:
        told += of_a_spawned_process(generations - 1)
    sender.send(told)


def of_a_spawned_process(generations: int) -> list[tuple[str, int]]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=facts, args=(sender, generations))
    child.start()
    assert receiver.poll(60), "a spawned process said nothing"
    told: list[tuple[str, int]] = receiver.recv()
    child.join(60)
    return told


def test_spawned_processes_and_their_own_begin_with_our_module_and_this_one_stays() -> None:
    before = sys.modules["__main__"].__spec__
    with spawning_lightly():
        told = of_a_spawned_process(generations=1)
    assert told == [(MAIN_MODULE, RARE_THRESHOLD)] * 2
    assert sys.modules["__main__"].__spec__ is before
    assert of_a_spawned_process(generations=0)[0] != (MAIN_MODULE, RARE_THRESHOLD)
