"""A scoring worker process: ``python -m rollout_server.scoring.worker <pid of the parent>``.

Reads batches from standard input, one at a time, and writes an answer per sample to standard
output, each before it begins the next one: what the pool has not heard of is what a late or dead
worker had in hand, and what it never began. Imports only the standard library and the rewards, so
that a replacement is ready within a fraction of a second. Ends with its parent: at the end of the
pipe when idle, by a signal of the kernel when busy.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from rollout_server.scoring.confinement import WorkerLimits, end_with_parent
from rollout_server.scoring.frames import SLICE_S, encode_frame, read_frame
from rollout_server.scoring.registry import BUILTIN_REWARDS, RewardFunction, import_reward
from rollout_server.scoring.signature import read_signature

MAX_DETAIL_BYTES = 64 * 1024
MAX_DETAIL_DEPTH = 50
"""Lists and objects within each other. Answers and their readers have limits of a few hundred."""
MAX_ERROR_CHARS = 2000


def main() -> None:
    """Serve jobs until the pool closes the pipe."""
    end_with_parent(int(sys.argv[1]))
    jobs, results = _take_over_pipes()
    setup = read_frame(jobs)
    if setup is None:
        return
    functions = {name: reward.function for name, reward in BUILTIN_REWARDS.items()}
    signatures = {}
    limits = WorkerLimits.from_json(setup["limits"])
    try:
        # Before anything of the user is imported: an import is code too.
        limits.apply()
    except OSError as exc:
        _send(results, {"refused": f"{exc.strerror or exc}"})
        return
    for name, target in setup["rewards"].items():
        try:
            functions[name] = import_reward(target)
            signatures[name] = read_signature(functions[name]).to_json()
        # User code: an import may raise anything, SystemExit included. The pool names it.
        except (Exception, SystemExit) as exc:  # noqa: BLE001
            _send(results, {"failed": name, "error": _describe(exc)})
            return
    _send(results, {"signatures": signatures})
    while (batch := read_frame(jobs)) is not None:
        for answer in run_batch(functions, batch, limits.start_sample):
            _send(results, answer)


def run_batch(
    functions: dict[str, RewardFunction],
    batch: dict[str, Any],
    start_sample: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, Any]]:
    """Judge completions of one prompt, in order, until the slice is used up.

    Args:
        batch: ``name``, ``prompt``, ``answer``, ``completions``, and ``question``: the JSON text of
            ``params`` and ``metadata``, parsed anew for every sample, since rewards may change
            what they get.
        start_sample: called before each sample.

    Yields:
        What ``run_job`` answers, with ``duration_s``, and ``last`` where no more will follow.
    """
    completions = batch["completions"]
    begun_s = clock()
    for number, completion in enumerate(completions, start=1):
        start_sample()
        started_s = clock()
        question = json.loads(batch["question"])
        answer = run_job(functions, {**batch, **question, "completion": completion})
        ended_s = clock()
        is_last = number == len(completions) or ended_s - begun_s >= SLICE_S
        yield {**answer, "duration_s": ended_s - started_s, "last": is_last}
        if is_last:
            return


def run_job(functions: dict[str, RewardFunction], job: dict[str, Any]) -> dict[str, Any]:
    """Call the reward: ``{"reward", "detail"}``, or ``{"error"}`` with what went wrong."""
    try:
        return _read_returned(
            functions[job["name"]](
                job["prompt"], job["completion"], job["answer"], job["metadata"], **job["params"]
            )
        )
    # User code may raise anything; sys.exit() in it must not cost the worker either.
    except (Exception, SystemExit) as exc:  # noqa: BLE001
        return {"error": _describe(exc)}


def _read_returned(returned: object) -> dict[str, Any]:
    match returned:
        case (value, dict() as detail):
            pass
        case value:
            detail = {}
    # Numbers of other libraries (numpy scalars) have __float__; text has not.
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(
            f"a reward returns a number or (number, dict), this one a {type(value).__name__}"
        )
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"reward {reward} is not finite")
    num_bytes = len(json.dumps(detail, allow_nan=False))
    if num_bytes > MAX_DETAIL_BYTES:
        raise ValueError(f"detail of {num_bytes} bytes is above the limit of {MAX_DETAIL_BYTES}")
    if _is_deeper(detail, MAX_DETAIL_DEPTH):
        raise ValueError(f"detail is nested deeper than the limit of {MAX_DETAIL_DEPTH} levels")
    return {"reward": reward, "detail": detail}


def _is_deeper(value: object, max_depth: int) -> bool:
    """Of a value whose JSON is small: what is shared inside it is visited once per place."""
    level = [value]
    for _ in range(max_depth + 1):
        level = [inner for outer in level for inner in _inner_values(outer)]
    return bool(level)


def _inner_values(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values() or (None,)  # an empty one is a level too
    if isinstance(value, (list, tuple)):
        return value or (None,)
    return ()


def _describe(exc: BaseException) -> str:
    frames = traceback.extract_tb(exc.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    limit = " above scoring.max_memory_mib?" if isinstance(exc, MemoryError) else ""
    return f"{type(exc).__name__}: {exc}"[:MAX_ERROR_CHARS] + limit + where


def _send(results: BinaryIO, message: dict[str, Any]) -> None:
    results.write(encode_frame(message))
    results.flush()


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to ourselves: what rewards print goes to standard error."""
    jobs = os.fdopen(os.dup(0), "rb")
    results = os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return jobs, results


if __name__ == "__main__":
    main()
