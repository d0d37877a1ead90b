"""A character-level tokenizer: one token per character, text and ids convert back exactly."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN)

# Every message's content, with nothing in between: the demo models know prompts, not turns.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build_tokenizer(alphabet: str, vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly ``vocab_size`` entries: specials, the alphabet, then fillers.

    Fillers give every id the model can produce a text, so that a random model's output decodes.
    ``<bos>`` exists but is never prepended: encoding is the same with and without special tokens,
    so the trainer and every server agree on a prompt's ids.

    Raises:
        ValueError: the alphabet does not fit.
    """
    tokens = [*SPECIAL_TOKENS, *alphabet]
    if len(set(tokens)) != len(tokens) or len(tokens) > vocab_size:
        raise ValueError(
            f"{len(tokens)} tokens (alphabet of {len(alphabet)}) must be distinct and fit into "
            f"vocab_size {vocab_size}"
        )
    tokens += [f"<{index}>" for index in range(len(tokens), vocab_size)]
    backend = Tokenizer(
        WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN_TOKEN)
    )
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
