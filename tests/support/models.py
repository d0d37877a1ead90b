"""Tiny models made on the spot, and Hugging Face as the independent judge of what they say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHARACTERS = "0123456789+-*=; abcdefghijklm"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)  # 32
CONTEXT_LENGTH = 512


def make_model(
    path: Path,
    *,
    seed: int,
    weight_std: float = 0.25,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Path:
    """A random Qwen3 of about 100k parameters with a character tokenizer.

    Args:
        weight_std: large enough that int8 rounding changes some of the drafter's choices, so that
            drafts are rejected now and then.
        sizes: fields of the configuration that differ from the usual.
    """
    torch.manual_seed(seed)
    usual = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    config = Qwen3Config(
        **{**usual, **sizes},
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=tie,
        initializer_range=weight_std,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """One token per character of ``CHARACTERS``, after the special ones."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(path)


def random_prompts(count: int, *, seed: int, longest: int = 60) -> list[list[int]]:
    """Prompts of 1 to ``longest`` tokens without special ones."""
    generator = random.Random(seed)
    return [
        [generator.randrange(3, VOCAB_SIZE) for _ in range(generator.randint(1, longest))]
        for _ in range(count)
    ]


def load_reference(path: Path) -> PreTrainedModel:
    """The model in Hugging Face, float32. Eager attention: the others leave out soft-capping."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )


def stretched(tokens: list[int], length: int) -> list[int]:
    """``tokens`` again and again, ``length`` in all."""
    return (tokens * length)[:length]


def greedy_reference(path: Path, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """What Hugging Face's ``generate`` says, token for token."""
    model = load_reference(path)
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
        outputs.append(generated[0, len(prompt) :].tolist())
    return outputs


@torch.no_grad()
def logprob_reference(
    path: Path, prompt: list[int], completion: list[int], temperature: float
) -> list[float]:
    """Log-softmax of logits / temperature at every completion token."""
    model = load_reference(path)
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()
