"""``slipstream rollout``: prompts from a JSONL file, samples into a JSONL file, resumable."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from pydantic import ValidationError

from shared.cli.options import (
    DEFAULT_URL,
    ApiKeyFileOption,
    CaFileOption,
    JsonOption,
    UrlOption,
    connect,
)
from shared.cli.output import print_json
from shared.cli.rollout_prompts import RolloutSettings, read_prompts
from shared.cli.rollout_requests import sample_chunk
from shared.cli.rollout_results import ResultFile
from shared.errors import ConfigurationError
from shared.progress import ProgressBar
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import RewardSpec, SamplingOptions

INTERRUPTED = 130


def rollout(
    prompts: Annotated[Path, typer.Argument(help="JSONL: a string, or an object with prompt | "
        "messages | prompt_token_ids and, if wanted, answer and metadata, per line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file; results in it are "
        "kept and their prompts are skipped.")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples per prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 keeps every token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps every token.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="0 keeps every token.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a sample. "
        "Repeatable.")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward the server applies.")] = None,
    reward_params: Annotated[str | None, typer.Option(metavar="JSON", help="Its parameters, as "
        "one JSON object.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Sampling seed.")] = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Prompts per request.")] = 256,
    retries: Annotated[int, typer.Option(min=0, help="Tries again after a lost server.")] = 5,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS",
        help="Longest silence between two results.")] = 1800.0,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    ca_file: CaFileOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Sample completions for a file of prompts; can be stopped and started again."""
    settings = RolloutSettings(
        n=n,
        sampling=sampling_options(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=stop or [],
            seed=seed,
        ),
        reward=reward_spec(reward, reward_params),
    )
    numbered = read_prompts(prompts, settings)
    with ResultFile(output) as results:
        todo = [prompt for prompt in numbered if prompt.prompt_id not in results.finished]
        num_skipped = len(numbered) - len(todo)
        if num_skipped:
            typer.echo(
                f"{num_skipped} of {len(numbered)} prompts are in {output} already", err=True
            )
        num_sampled = 0
        try:
            with (
                interrupted_by_sigterm(),
                connect(url, timeout_s, api_key_file, ca_file) as client,
                ProgressBar("rollouts", len(numbered), completed=num_skipped) as bar,
            ):
                for start in range(0, len(todo), chunk_size):
                    chunk = todo[start : start + chunk_size]
                    with closing(sample_chunk(client, chunk, settings, retries)) as groups:
                        for prompt_id, group in groups:
                            results.add(prompt_id, group)
                            num_sampled += 1
                            bar.advance()
        except KeyboardInterrupt:
            num_left = len(todo) - num_sampled
            typer.echo(f"stopped, {num_left} prompts are left: the same command goes on", err=True)
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json({"output": str(output), "num_sampled": num_sampled, "num_skipped": num_skipped})


def sampling_options(**fields: object) -> SamplingOptions:
    """
    Raises:
        ConfigurationError: naming the option that is wrong.
    """
    try:
        return SamplingOptions.model_validate(fields)
    except ValidationError as exc:
        problem = exc.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-") if problem["loc"] else "sampling"
        raise ConfigurationError(f"--{option}: {problem['msg']}", param=f"--{option}") from exc


def reward_spec(name: str | None, params: str | None) -> RewardSpec | None:
    """``--reward`` and ``--reward-params``.

    Raises:
        ConfigurationError: parameters of no reward, or that are not a JSON object.
    """
    if name is None:
        if params is not None:
            raise ConfigurationError("--reward-params needs --reward", param="--reward")
        return None
    if params is None:
        return RewardSpec(name=name)
    try:
        parsed: JsonObject = json.loads(params)
    except json.JSONDecodeError as exc:
        raise ConfigurationError(f"--reward-params {params!r} is not JSON: {exc}") from exc
    if not isinstance(parsed, dict):
        raise ConfigurationError(f"--reward-params {params!r} is not a JSON object")
    return RewardSpec(name=name, params=parsed)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """A batch system's SIGTERM ends the block as Ctrl-C does, tidily."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
