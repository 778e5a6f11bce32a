"""A byte-level tokenizer of 270 tokens with a chat template, made on the spot: no file, no network."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def make_tokenizer() -> Callable[[str | None], PreTrainedTokenizerFast]:
    """Build a tokenizer with the given chat template. One token a byte, but two line breaks in a row are one token."""

    def make(template: str | None) -> PreTrainedTokenizerFast:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: index for index, letter in enumerate([*letters, "\u010a\u010a"])}  # U+010A: a line break
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u010a", "\u010a")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<s>")
        fast.chat_template = template
        return fast

    return make


@pytest.fixture
def chatml(make_tokenizer: Callable[[str | None], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer with a ChatML template that brings its own system message, as the embedded target's does."""
    return make_tokenizer(CHATML)
