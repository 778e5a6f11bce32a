"""Stop strings: found wherever the text is cut, no part of the answer, and nothing of them is shown too early."""

import random

import pytest

from pipelines.server.texts import AnswerText, StopText
from tests.pipelines.tiny import tokenizer


def _run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    text = StopText(stops)
    given = [text.add(piece) for piece in pieces]
    return [*given, text.finish()], text.found


def test_text_without_a_stop_string_goes_through() -> None:
    assert _run(["END"], ["one ", "two"]) == (["one ", "two", ""], False)


def test_a_stop_string_ends_the_text_before_itself() -> None:
    assert _run(["END"], ["one END two"]) == (["one ", ""], True)


def test_a_stop_string_in_several_pieces_is_never_shown() -> None:
    assert _run(["END"], ["one E", "N", "D two"]) == (["one ", "", "", ""], True)


def test_what_only_began_like_a_stop_string_is_shown_once_that_is_clear() -> None:
    assert _run(["END"], ["one EN", "E", "ND"]) == (["one ", "EN", "", ""], True)
    assert _run(["END"], ["one EN"]) == (["one ", "EN"], False)


def test_nothing_comes_after_a_stop_string() -> None:
    assert _run(["b"], ["ab", "cd"]) == (["a", "", ""], True)


@pytest.mark.parametrize("seed", range(30))
def test_where_text_is_cut_does_not_matter(seed: int) -> None:
    draw = random.Random(seed)
    whole = "".join(draw.choices("abc", k=30))
    stops = ["".join(draw.choices("abc", k=draw.randint(1, 5))) for _ in range(3)]
    one_by_one, found = _run(stops, list(whole))
    at_once = _run(stops, [whole])
    assert ("".join(one_by_one), found) == ("".join(at_once[0]), at_once[1])
    # Derived anew: the text before the first prefix that ends in a stop string.
    ends = (n for n in range(1, 31) if any(whole[:n].endswith(stop) for stop in stops))
    end = next(ends, None)
    if end is None:
        assert not found and "".join(one_by_one) == whole
    else:
        longest = max(len(stop) for stop in stops if whole[:end].endswith(stop))
        assert found and "".join(one_by_one) == whole[: end - longest]


@pytest.mark.parametrize("width", [1, 2, 7])
def test_an_answer_ends_at_the_same_token_whatever_a_round_emits(width: int) -> None:
    ids = tokenizer()("hello world")["input_ids"]
    answer = AnswerText(tokenizer(), ["wo"])
    text = "".join(answer.add(ids[start : start + width]) for start in range(0, len(ids), width))
    assert (text + answer.finish(), answer.stopped) == ("hello ", True)
    assert answer.tokens == ids[:8]  # a token is a byte: "hello wo"


def test_an_answer_without_stop_strings_is_all_its_tokens() -> None:
    ids = tokenizer()("hello")["input_ids"]
    answer = AnswerText(tokenizer(), [])
    assert answer.add(ids) + answer.finish() == "hello"
    assert (answer.tokens, answer.stopped) == (ids, False)
