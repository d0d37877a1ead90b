"""The Hugging Face tokenizer behind the service's protocol."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout_server.tokenizer import HuggingFaceTokenizer
from shared.errors import InvalidRequestError
from shared.schemas.rollouts import ChatMessage

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def byte_tokenizer(chat_template: str | None) -> HuggingFaceTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template)
    )


def chat(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage.model_validate({"role": role, "content": text}) for role, text in turns]


def test_text_survives_the_way_there_and_back() -> None:
    tokenizer = byte_tokenizer(None)
    assert tokenizer.decode(tokenizer.encode("a + b = é?")) == "a + b = é?"


def test_messages_are_rendered_up_to_where_the_assistant_begins() -> None:
    tokenizer = byte_tokenizer(TEMPLATE)
    token_ids = tokenizer.encode_chat(chat(("system", "S"), ("user", "2+2")))
    assert all(type(token_id) is int for token_id in token_ids)
    assert tokenizer.decode(token_ids) == "sSu2+2a"


def test_a_template_that_refuses_the_messages_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequestError, match="no tools"):
        byte_tokenizer(TEMPLATE).encode_chat(chat(("tool", "x")))


def test_without_a_chat_template_messages_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="has none"):
        byte_tokenizer(None).encode_chat(chat(("user", "x")))


def test_several_threads_may_encode_at_once() -> None:
    tokenizer = byte_tokenizer(None)
    texts = [f"text {index}" for index in range(200)]
    with ThreadPoolExecutor(4) as threads:
        assert [tokenizer.decode(ids) for ids in threads.map(tokenizer.encode, texts)] == texts
