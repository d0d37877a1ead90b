"""``slipstream bench load``: a closed loop of rollout requests against a running server."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer
from pydantic import JsonValue
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from shared.cli.options import (
    DEFAULT_URL,
    ApiKeyFileOption,
    CaFileOption,
    JsonOption,
    UrlOption,
)
from shared.cli.output import print_json, print_table, stderr_console
from shared.cli.rollout_prompts import RolloutSettings, read_prompts
from shared.client import AsyncRolloutClient, rollout_request
from shared.credentials import ClientCredentials, load_credentials
from shared.errors import RequestError, SlipstreamError, first_error
from shared.schemas.rollouts import PromptItem, RewardSpec, RolloutUsage, SamplingOptions

PROMPTS = tuple(f"What is {number} + {number * 7 % 90}?" for number in range(10, 90))
"""Where no file is given: short, and different, so that few share a prefix."""
PROGRESS_INTERVAL_S = 0.2

_SERVER_CODE = re.compile(r"\([0-9]{3} ([a-z_]+)\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """What to send."""

    prompts: Sequence[PromptItem]
    settings: RolloutSettings
    concurrency: int
    duration_s: float
    timeout_s: float


@dataclass(kw_only=True, slots=True)
class LoadFigures:
    """What came back."""

    elapsed_s: float = 0.0
    num_samples: int = 0
    num_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    """By their code."""

    def note(self, usage: RolloutUsage, num_samples: int, latency_s: float) -> None:
        """One answered request."""
        self.num_samples += num_samples
        self.num_tokens += usage.num_completion_tokens
        self.latencies_s.append(latency_s)

    def report(self) -> dict[str, JsonValue]:
        """Rates and quantiles; None where nothing was answered."""
        latencies = sorted(self.latencies_s)
        elapsed_s = self.elapsed_s or 1.0
        return {
            "elapsed_s": round(self.elapsed_s, 3),
            "requests": len(latencies),
            "requests_per_s": round(len(latencies) / elapsed_s, 3),
            "samples_per_s": round(self.num_samples / elapsed_s, 3),
            "completion_tokens_per_s": round(self.num_tokens / elapsed_s, 3),
            "latency_s_p50": _quantile(latencies, 0.5),
            "latency_s_p90": _quantile(latencies, 0.9),
            "latency_s_p99": _quantile(latencies, 0.99),
            "latency_s_mean": round(statistics.fmean(latencies), 4) if latencies else None,
            "errors": dict(self.errors),
        }


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 4)


async def run_load(
    url: str, credentials: ClientCredentials, plan: LoadPlan, progress: Progress
) -> LoadFigures:
    """As many requests of one prompt under way as ``plan.concurrency``, until the time is up.

    Requests that are under way then are waited for, and count.

    Raises:
        UnavailableError: nobody answers at ``url``.
        RequestError: the server refuses what is sent.
    """
    figures = LoadFigures()
    prompts = itertools.cycle(plan.prompts)
    async with AsyncRolloutClient(url, timeout_s=plan.timeout_s, credentials=credentials,
                                  pause=_no_retries) as client:  # fmt: skip
        await client.version()  # a wrong address or key ends it here
    started_s = monotonic()
    failure: SlipstreamError | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_show(progress, started_s, plan.duration_s, figures))
            for _ in range(plan.concurrency):
                tasks.create_task(
                    _one_after_the_other(url, credentials, plan, prompts, started_s, figures)
                )
    except* SlipstreamError as errors:
        failure = first_error(errors)
    if failure is not None:
        raise failure
    figures.elapsed_s = monotonic() - started_s
    return figures


async def _one_after_the_other(
    url: str,
    credentials: ClientCredentials,
    plan: LoadPlan,
    prompts: Iterator[PromptItem],
    started_s: float,
    figures: LoadFigures,
) -> None:
    settings = plan.settings
    # A client each: one of them keeps fewer connections than there may be requests.
    async with AsyncRolloutClient(
        url, timeout_s=plan.timeout_s, credentials=credentials, pause=_no_retries
    ) as client:
        while monotonic() - started_s < plan.duration_s:
            request = rollout_request(
                [next(prompts)], n=settings.n, sampling=settings.sampling, reward=settings.reward
            )
            sent_s = monotonic()
            try:
                response = await client.rollout(request)
            except RequestError:
                raise  # the same for every request: nothing to measure
            except SlipstreamError as exc:
                figures.errors[_code(exc)] += 1
                await asyncio.sleep(exc.retry_after_s or 1.0)
                continue
            figures.note(response.usage, settings.n, monotonic() - sent_s)


def _code(error: SlipstreamError) -> str:
    """The server's, where the error came from there."""
    match = _SERVER_CODE.search(error.message)
    return error.code if match is None else match[1]


async def _no_retries(delay_s: float) -> bool:
    """A refused request is a figure, not something to hide."""
    return True


async def _show(
    progress: Progress, started_s: float, duration_s: float, figures: LoadFigures
) -> None:
    bar = progress.add_task("load", total=duration_s)
    while (elapsed_s := monotonic() - started_s) < duration_s:
        progress.update(
            bar, completed=elapsed_s, description=f"{len(figures.latencies_s)} requests"
        )
        await asyncio.sleep(PROGRESS_INTERVAL_S)
    progress.update(bar, completed=duration_s, description="waiting for the last ones")


def load(
    prompts: Annotated[Path | None, typer.Option(help="JSONL as for `slipstream rollout`; else "
        "short questions of its own.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 16,
    duration_s: Annotated[float, typer.Option("--duration", min=0.1, metavar="SECONDS",
        help="How long new requests are sent.")] = 30.0,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples per prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Every completion has "
        "--max-tokens.")] = False,
    reward: Annotated[str | None, typer.Option(help="Reward the server applies.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS",
        help="Longest wait for an answer.")] = 600.0,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Load a running server: closed loop, one prompt per request; rates and latencies."""
    settings = RolloutSettings(
        n=n,
        sampling=SamplingOptions(
            max_tokens=max_tokens, temperature=temperature, ignore_eos=ignore_eos
        ),
        reward=RewardSpec(name=reward) if reward else None,
    )
    if prompts is None:
        items = [PromptItem(prompt=prompt) for prompt in PROMPTS]
    else:
        items = [numbered.item for numbered in read_prompts(prompts, settings)]
    plan = LoadPlan(
        prompts=items,
        settings=settings,
        concurrency=concurrency,
        duration_s=duration_s,
        timeout_s=timeout_s,
    )
    credentials = load_credentials(api_key_file, ca_file, os.environ)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console()) as progress:
        figures = asyncio.run(run_load(url, credentials, plan, progress))
    report = figures.report()
    if as_json:
        print_json({"bench": "load", "concurrency": concurrency, "n": n,
                    "max_tokens": max_tokens, **report})  # fmt: skip
    else:
        rows = [(name.replace("_", " "), value) for name, value in report.items()]
        print_table(f"load on {url}", ("figure", "value"), rows)
    if not figures.latencies_s:
        raise typer.Exit(1)
