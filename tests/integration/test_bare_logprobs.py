"""Logprobs are kept; the texts of single tokens, which nobody reads, are not made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rollout_server.engine.vllm_plugin.bare_logprobs import without_token_texts

logprobs = pytest.importorskip("vllm.v1.engine.logprobs")
outputs = pytest.importorskip("vllm.v1.outputs")


class Tokenizer:
    """Nobody may ask it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of the tokenizer was asked for")


SAMPLING = SimpleNamespace(num_logprobs=0, prompt_logprobs=None, flat_logprobs=True)
REQUEST = SimpleNamespace(sampling_params=SAMPLING)


def update(processor: Any) -> None:
    """With one token."""
    lists = outputs.LogprobsLists(np.array([[7]]), np.array([[-0.5]]), np.array([3]), None)
    processor.update_from_output(
        SimpleNamespace(
            new_logprobs=lists,
            new_prompt_logprobs_tensors=None,
            prompt_token_id_logprobs=None,
        )
    )


def test_a_token_keeps_its_logprob_and_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    patched = without_token_texts(logprobs.LogprobsProcessor.from_new_request)
    monkeypatch.setattr(logprobs.LogprobsProcessor, "from_new_request", patched)
    processor = logprobs.LogprobsProcessor.from_new_request(Tokenizer(), REQUEST)
    update(processor)
    assert processor.logprobs.logprobs == [-0.5]
    assert processor.cumulative_logprob == -0.5


def test_vllm_decodes_it_where_there_is_a_tokenizer() -> None:
    """Else the patch is for nothing."""
    processor = logprobs.LogprobsProcessor.from_new_request(None, REQUEST)
    processor.tokenizer = Tokenizer()
    with pytest.raises(AssertionError, match="of the tokenizer was asked for"):
        update(processor)
