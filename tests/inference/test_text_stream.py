"""Text that grows: pieces make up the whole whatever the rounds, and a token costs the same however long the answer."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from inference.text_stream import TextStream
from tests.pipelines.tiny import tokenizer


def _metaspace() -> PreTrainedTokenizerFast:
    """Words whose blank comes before them and is dropped at the start of a text."""
    words = ["\u2581a", "\u2581bee", "c", "<s>"]
    built = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="c"))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>")


def _pieces(vocabulary: PreTrainedTokenizerBase, rounds: list[list[int]]) -> list[str]:
    stream = TextStream(vocabulary)
    return [*(stream.add(tokens) for tokens in rounds), stream.finish()]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("made", [tokenizer, _metaspace])
def test_pieces_make_up_the_text_however_it_is_cut(made: object, seed: int) -> None:
    vocabulary: PreTrainedTokenizerBase = made()  # type: ignore[operator]
    draw = random.Random(seed)
    tokens = [draw.randrange(len(vocabulary)) for _ in range(200)]
    rounds, start = [], 0
    while start < len(tokens):
        width = draw.randint(1, 5)
        rounds.append(tokens[start : start + width])
        start += width
    assert "".join(_pieces(vocabulary, rounds)) == vocabulary.decode(tokens, skip_special_tokens=True)


def test_a_blank_behind_a_special_token_is_kept() -> None:
    # 0 is " a", 3 is special: the text is "a a", and the blank must not be lost with the token before it.
    assert _pieces(_metaspace(), [[0], [3], [0]]) == ["a", "", " a", ""]


def test_a_character_waits_for_its_last_byte() -> None:
    ids = tokenizer()("\u00e9")["input_ids"]
    assert _pieces(tokenizer(), [[i] for i in ids]) == ["", "\u00e9", ""]


def test_a_long_answer_decodes_few_tokens_at_a_time() -> None:
    longest = 0

    class Watched:
        def decode(self, tokens: list[int], **options: bool) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return "x" * len(tokens)

    stream = TextStream(Watched())  # type: ignore[arg-type]
    for _ in range(500):
        stream.add([1, 2])
    assert longest == 4  # the newest two and the two before them
