"""Log lines: their forms, the ids on them, and what must never be in them."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from shared.config.loading import load_run_config
from shared.errors import ConfigurationError, EngineError
from shared.logging import configure_logging, log_context, log_fields
from shared.types import LogFormat, LogLevel
from tests.fakes.engine import FakeEngine
from tests.fakes.service import FakeScorer, fake_service, running
from tests.support.scrape import PUSH

LOGGER = logging.getLogger("tests.logging")
SECRET = "xyzzy-prompt"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where lines go; the process's logging is put back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_has_the_ids_of_its_context_as_fields(stream: io.StringIO) -> None:
    configure_logging("INFO", "server", stream, LogFormat.JSON)
    with log_context(request_id="r", http_request_id="h"), log_context(group_id="r/group=0"):
        with log_context(engine_id="engine-0", weight_version=7):
            LOGGER.info("inner %d", 1)
        LOGGER.warning("outer")
    LOGGER.info("outside")
    inner, outer, outside = lines_of(stream)
    assert inner.pop("time").endswith("Z")
    assert inner == {
        "level": "INFO",
        "process": "server",
        "logger": "tests.logging",
        "message": "inner 1",
        "http_request_id": "h",
        "request_id": "r",
        "group_id": "r/group=0",
        "engine_id": "engine-0",
        "weight_version": 7,
    }
    assert (outer["group_id"], outer.get("engine_id")) == ("r/group=0", None)
    assert "request_id" not in outside


def test_a_json_line_is_one_line_and_carries_the_traceback(stream: io.StringIO) -> None:
    configure_logging("INFO", "server", stream, LogFormat.JSON)
    try:
        raise EngineError("it\nbroke")
    except EngineError:
        LOGGER.exception("a\nb")
    (entry,) = lines_of(stream)
    assert entry["message"] == "a\nb"
    assert "EngineError: it\nbroke" in entry["exception"]


def test_a_text_line_ends_with_its_ids(stream: io.StringIO) -> None:
    configure_logging("INFO", "server", stream)
    with log_context(request_id="r", engine_id="e"):
        LOGGER.info("done")
    LOGGER.info("bare")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("tests.logging: done [request_id=r engine_id=e]")
    assert second.endswith("tests.logging: bare")


async def test_tasks_keep_the_ids_they_were_started_with() -> None:
    async def seen() -> object:
        await asyncio.sleep(0)
        return log_fields().get("group_id")

    tasks = []
    for name in "ab":
        with log_context(group_id=name):
            tasks.append(asyncio.create_task(seen()))
    assert await asyncio.gather(*tasks) == ["a", "b"]
    assert "group_id" not in log_fields()


def test_level_and_format_are_settings() -> None:
    overrides = ["model.path=m", "logging.level=DEBUG", "logging.format=json"]
    config = load_run_config(None, overrides, environment={})
    assert (config.logging.level, config.logging.format) == (LogLevel.DEBUG, LogFormat.JSON)
    with pytest.raises(ConfigurationError, match=r"logging.format.*'text' or 'json'.*'xml'"):
        load_run_config(None, ["model.path=m", "logging.format=xml"], environment={})


async def test_lines_of_a_request_name_it_its_groups_engine_and_version(
    stream: io.StringIO,
) -> None:
    configure_logging("DEBUG", "server", stream, LogFormat.JSON)
    async with running(fake_service([FakeEngine("engine-0", committed_version=3)])) as client:
        body = {"request_id": "r", "prompts": [{"prompt": SECRET}]}
        await client.post("/v1/rollouts", json=body, headers={"x-request-id": "h"})
        await client.post("/v1/weights", json={**PUSH, "base_version": 9})
    entries = {entry["message"].split()[0]: entry for entry in lines_of(stream)}
    group = entries["group"]
    assert (group["http_request_id"], group["request_id"]) == ("h", "r")
    assert (group["group_id"], group["engine_id"]) == ("r/group=0", "engine-0")
    assert group["weight_version"] == 3
    finished = entries["rollout"]
    assert (finished["level"], finished["request_id"]) == ("INFO", "r")
    assert entries["POST"]["http_request_id"]


async def test_prompts_completions_and_rewards_are_in_no_line(stream: io.StringIO) -> None:
    configure_logging("DEBUG", "server", stream, LogFormat.JSON)
    scorer = FakeScorer()
    engines = [FakeEngine("a"), FakeEngine("dies", dies_on_generate=True)]
    prompts = [{"prompt": SECRET, "answer": SECRET, "metadata": {"note": SECRET}}] * 4
    body = {"prompts": prompts, "n": 2, "reward": {"name": "length"}}
    completion = {"model": "models/tiny", "prompt": SECRET, "max_tokens": 6}
    async with running(fake_service(engines, scorer=scorer)) as client:
        texts = (await client.post("/v1/rollouts", json=body)).json()
        scorer.broken = True
        await client.post("/v1/rollouts", json=body)
        engines[0].fail_with = EngineError("out of memory")
        await client.post("/v1/rollouts", json=body)
        for stream_it in (True, False):
            await client.post("/v1/completions", json={**completion, "stream": stream_it})
        await client.post("/v1/rollouts", json={"prompts": SECRET})  # does not validate
        await client.post("/v1/rollouts", content=f'{{"prompts": "{SECRET}')
        await client.post("/v1/rollouts", json={**body, "reward": {"name": SECRET}})
    written = stream.getvalue()
    assert "dies" in written
    assert "scoring" in written
    assert "out of memory" in written
    assert SECRET not in written
    assert texts["groups"][0]["samples"][0]["text"] not in written


async def test_a_bug_that_meets_a_prompt_does_not_log_it(stream: io.StringIO) -> None:
    """pydantic's own messages quote what they were given."""
    from shared.schemas.rollouts import RolloutRequest

    configure_logging("DEBUG", "server", stream, LogFormat.JSON)
    service = fake_service()

    async def buggy(request: RolloutRequest) -> None:
        RolloutRequest.model_validate({"prompts": SECRET, "n": SECRET})

    service.rollouts.submit = buggy  # type: ignore[assignment, method-assign]
    async with running(service) as client:
        answer = await client.post("/v1/rollouts", json={"prompts": [{"prompt": "a"}]})
    assert answer.status_code == 500
    assert "ValidationError" in stream.getvalue()
    assert SECRET not in stream.getvalue()
