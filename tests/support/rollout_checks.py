"""What an answer must have, and the server's books, when something has died under the rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.metrics import PREFIX

BOOKS = ("samples_accepted_total", "samples_delivered_total", "samples_failed_total",
         "samples_cancelled_total", "pending_samples", "samples_unaccounted")  # fmt: skip


def greedy_body(request_id: str, prompts: Sequence[list[int]], num_tokens: int) -> dict[str, Any]:
    """One greedy sample of every prompt, of exactly so many tokens."""
    return {
        "request_id": request_id,
        "prompts": [{"prompt_token_ids": prompt} for prompt in prompts],
        "sampling": {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True},
    }


def tokens_of_whole(
    result: Mapping[str, Any], num_prompts: int, num_tokens: int
) -> list[list[int]]:
    """Token ids by prompt. Every prompt is answered once, every token is of exactly one span."""
    groups = result["groups"]
    assert [group["prompt_index"] for group in groups] == list(range(num_prompts))
    tokens = []
    for group in groups:
        (sample,) = group["samples"]
        assert (sample["sample_index"], sample["finish_reason"]) == (0, "length")
        assert len(sample["token_ids"]) == len(sample["logprobs"]) == num_tokens
        spans = sample["weight_versions"]
        covered = [index for span in spans for index in range(span["start"], span["end"])]
        assert covered == list(range(num_tokens)), spans
        tokens.append(sample["token_ids"])
    return tokens


def engines_of(result: Mapping[str, Any]) -> set[str]:
    """Who finished its samples."""
    return {sample["engine_id"] for group in result["groups"] for sample in group["samples"]}


def metrics_of(text: str) -> dict[str, float]:
    """The server's own metrics that have no labels."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name.startswith(PREFIX) and "{" not in name:
            found[name.removeprefix(PREFIX)] = float(value)
    return found


def check_books(text: str, num_samples: int) -> None:
    """Everything that was accepted was delivered, and nothing else was.

    Args:
        text: body of ``/metrics``.
        num_samples: what all requests so far have asked for.
    """
    metrics = metrics_of(text)
    assert {name: metrics[name] for name in BOOKS} == {
        "samples_accepted_total": num_samples,
        "samples_delivered_total": num_samples,
        "samples_failed_total": 0,
        "samples_cancelled_total": 0,
        "pending_samples": 0,
        "samples_unaccounted": 0,
    }
