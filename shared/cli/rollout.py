"""``slipstream rollout``: prompts from a JSONL file, samples into a JSONL file, resumable."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shared.cli.api_client import ApiClient
from shared.cli.options import (
    DEFAULT_URL,
    ApiKeyFileOption,
    CaFileOption,
    JsonOption,
    UrlOption,
    connect,
)
from shared.cli.output import print_json, stderr_console
from shared.errors import ConfigurationError, UnavailableError
from shared.schemas.rollouts import (
    PromptItem,
    RewardSpec,
    RolloutGroup,
    RolloutRequest,
    SamplingOptions,
)

MAX_RETRY_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedPrompt:
    """A prompt with the id its result carries in the output file."""

    prompt_id: str
    item: PromptItem


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSettings:
    """What is the same for every prompt of the file."""

    n: int
    sampling: SamplingOptions
    reward: RewardSpec | None


def rollout(
    prompts: Annotated[Path, typer.Argument(help="JSONL: a string, or an object with prompt | "
        "messages | prompt_token_ids and, if wanted, answer and metadata, per line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file; results in it are "
        "kept and their prompts are skipped.")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples per prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    reward: Annotated[str | None, typer.Option(help="Reward the server applies.")] = None,
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
        sampling=SamplingOptions(max_tokens=max_tokens, temperature=temperature, seed=seed),
        reward=RewardSpec(name=reward) if reward else None,
    )
    numbered = read_prompts(prompts, settings)
    done = finished_prompt_ids(output)
    todo = [prompt for prompt in numbered if prompt.prompt_id not in done]
    num_skipped = len(numbered) - len(todo)
    console = stderr_console()
    if num_skipped:
        console.print(f"{num_skipped} of {len(numbered)} prompts are in {output} already")
    columns = (TextColumn("rollouts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        connect(url, timeout_s, api_key_file, ca_file) as client,
        output.open("a", encoding="utf-8") as file,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("rollouts", total=len(numbered), completed=num_skipped)
        for start in range(0, len(todo), chunk_size):
            chunk = todo[start : start + chunk_size]
            for prompt_id, group in sample_chunk(client, chunk, settings, retries):
                record = {"prompt_id": prompt_id, **group.model_dump(mode="json")}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                progress.advance(task)
    if as_json:
        print_json({"output": str(output), "num_sampled": len(todo), "num_skipped": num_skipped})


def read_prompts(path: Path, settings: RolloutSettings) -> list[NumberedPrompt]:
    """Parse and check the whole file before the first prompt is sent.

    Raises:
        ConfigurationError: naming the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"cannot read prompts from {path}: {exc}") from exc
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            fields = {"prompt": data} if isinstance(data, str) else data
            item = PromptItem.model_validate(fields)
        except json.JSONDecodeError as exc:
            raise ConfigurationError(f"{path} line {number} is not JSON: {exc}") from exc
        except ValidationError as exc:
            problem = exc.errors()[0]
            key = ".".join(str(part) for part in problem["loc"]) or "prompt"
            raise ConfigurationError(f"{path} line {number}: {key}: {problem['msg']}") from exc
        prompts.append(NumberedPrompt(prompt_id=prompt_id_of(number, item, settings), item=item))
    return prompts


def prompt_id_of(number: int, item: PromptItem, settings: RolloutSettings) -> str:
    """Line number and a digest of prompt and settings: other settings are other results."""
    parts = [
        item.model_dump_json(),
        str(settings.n),
        settings.sampling.model_dump_json(),
        settings.reward.model_dump_json() if settings.reward else "",
    ]
    return f"{number}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"


def finished_prompt_ids(path: Path) -> set[str]:
    """Ids in the output so far. A last line cut off by a crash is removed from the file.

    Raises:
        ConfigurationError: the file holds something else than results.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(complete))
    done = set()
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            done.add(str(json.loads(line)["prompt_id"]))
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigurationError(
                f"--output {path} line {number} is not a result of `slipstream rollout`; "
                "give another file"
            ) from exc
    return done


def sample_chunk(
    client: ApiClient, chunk: Sequence[NumberedPrompt], settings: RolloutSettings, retries: int
) -> Iterator[tuple[str, RolloutGroup]]:
    """Yield results as they finish; after a lost connection only what is missing is sent again.

    Raises:
        UnavailableError: the server stayed away for ``retries`` tries in a row.
    """
    missing = {prompt.prompt_id: prompt.item for prompt in chunk}
    failures = 0
    while missing:
        ids = list(missing)
        request = RolloutRequest(
            request_id=f"cli-{uuid.uuid4().hex}",
            prompts=[missing[prompt_id] for prompt_id in ids],
            n=settings.n,
            sampling=settings.sampling,
            reward=settings.reward,
            stream=True,
        )
        try:
            for line in client.stream_rollouts(request):
                if line.group is not None:
                    prompt_id = ids[line.group.prompt_index]
                    del missing[prompt_id]
                    failures = 0
                    yield prompt_id, line.group
        except UnavailableError as exc:
            failures += 1
            if failures > retries:
                raise
            time.sleep(min(MAX_RETRY_WAIT_S, (exc.retry_after_s or 1.0) * 2 ** (failures - 1)))
