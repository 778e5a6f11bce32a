"""Which token stands for what is to come."""

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from inference.unused_tokens import unused_token


def tokenizer(*special: str, template: str = "") -> PreTrainedTokenizerFast:
    """Ten words, then `<s>` and `</s>`, which are ids 10 and 11, then these."""
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", *special)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = template
    return fast


def test_a_row_beyond_the_tokenizer_comes_first() -> None:
    assert unused_token(tokenizer("<spare>"), 16) == 13


def test_else_the_last_special_token_that_has_no_work() -> None:
    assert unused_token(tokenizer("<a>", "<b>"), 14) == 13


def test_a_token_of_the_chat_template_has_work() -> None:
    assert unused_token(tokenizer("<a>", "<b>", template="{{ '<b>' + messages }}"), 14) == 12


def test_tokens_that_end_and_start_texts_are_never_taken() -> None:
    assert unused_token(tokenizer(), 12) is None
