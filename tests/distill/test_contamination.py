"""Overlap with held-out prompts, counted word by word in the comments."""

import time

import pytest

from distill.contamination import SourceCounts, deduplicate, filter_contaminated, words
from distill.prompts import Prompt

TEN = "one two three four five six seven eight nine ten"


def prompt(text: str, *more: str, source: str = "a", system: str | None = None, name: str = "") -> Prompt:
    return Prompt(name or text[:20], "chat", source, (text, *more), system=system)


def kept(*training: Prompt, heldout: list[Prompt], ngram_words: int = 10) -> list[Prompt]:
    return filter_contaminated(training, heldout=heldout, ngram_words=ngram_words)[0]


def test_words_are_lowercased_runs_of_letters_and_digits() -> None:
    assert words("It's snake_case, x2: CAF\u00c9!") == ["it", "s", "snake", "case", "x2", "caf\u00e9"]


def test_scripts_without_spaces_count_a_word_a_character() -> None:
    assert words("\u5929\u7a7a is \u84dd\u8272") == ["\u5929", "\u7a7a", "is", "\u84dd", "\u8272"]


def test_ten_shared_words_are_too_many() -> None:
    # Other words around them, other case and punctuation between them: the run is the same.
    training = prompt("Please count: ONE, two; three-four five (six) seven eight nine ten! Then stop.")
    assert kept(training, heldout=[prompt(f"Say {TEN} aloud")]) == []


def test_nine_shared_words_are_fine() -> None:
    training = prompt("zero one two three four five six seven eight nine eleven")  # nine in a row, then another word
    assert kept(training, heldout=[prompt(TEN)]) == [training]


def test_ten_words_in_another_order_are_fine() -> None:
    training = prompt(" ".join(reversed(TEN.split())))
    assert kept(training, heldout=[prompt(TEN)]) == [training]


def test_a_run_does_not_reach_across_turns() -> None:
    split = prompt("one two three four five", "six seven eight nine ten")
    assert kept(split, heldout=[prompt(TEN)]) == [split]


def test_every_turn_is_checked_on_both_sides() -> None:
    training = prompt("Good morning to you", TEN)
    assert kept(training, heldout=[prompt("Another thing entirely", f"and {TEN}")]) == []


def test_a_copy_of_a_short_held_out_turn_is_dropped_but_a_longer_prompt_with_it_is_not() -> None:
    copy, longer = prompt("what is 2 + 2"), prompt("Tell me, what is 2+2, and why?")
    assert kept(copy, longer, heldout=[prompt("What is 2+2?")]) == [longer]


def test_the_length_of_a_run_can_be_set() -> None:
    training = prompt("five six seven eight")
    assert kept(training, heldout=[prompt(TEN)], ngram_words=4) == []
    assert kept(training, heldout=[prompt(TEN)], ngram_words=5) == [training]
    with pytest.raises(ValueError, match="at least one word"):
        filter_contaminated([], heldout=[], ngram_words=0)


def test_system_messages_are_not_compared() -> None:
    training = prompt("Hello there", system=TEN)
    assert kept(training, heldout=[prompt("Hi", system=TEN)]) == [training]


def test_a_prompt_without_any_word_overlaps_with_nothing() -> None:
    training = prompt("+ - * /")
    assert kept(training, heldout=[prompt("?!")]) == [training]


def test_repeats_are_dropped_once_white_space_and_case_are_put_aside() -> None:
    first, again = prompt("Add x + 1", name="1"), prompt(" add  X +\n1 ", name="2", source="b")
    other = prompt("Add x - 1", name="3")  # the same words, another sum
    assert kept(first, again, other, heldout=[]) == [first, other]
    assert deduplicate([first, again, other]) == [first, other]


def test_the_same_words_under_another_system_message_are_another_prompt() -> None:
    both = [prompt("Hi", system="Be kind.", name="1"), prompt("Hi", system="Be terse.", name="2")]
    assert deduplicate(both) == both


def test_counts_per_source_add_up() -> None:
    training = [
        prompt("Hello", source="a", name="a1"),
        prompt("hello", source="a", name="a2"),
        prompt(TEN, source="b", name="b1"),
        prompt(TEN, source="b", name="b2"),  # a repeat of a dropped one counts as a repeat
        prompt("World", source="b", name="b3"),
    ]
    left, report = filter_contaminated(training, heldout=[prompt(TEN)])
    assert [p.id for p in left] == ["a1", "b3"]
    assert report.sources == {
        "a": SourceCounts(loaded=2, duplicates=1, contaminated=0, kept=1),
        "b": SourceCounts(loaded=3, duplicates=1, contaminated=1, kept=1),
    }
    assert report.total == SourceCounts(loaded=5, duplicates=2, contaminated=1, kept=2)
    assert report.contaminated_ids == ["b1"]
    assert report.to_dict()["ngram_words"] == 10


def test_the_work_grows_with_the_words_not_with_their_product() -> None:
    # 4,000 x 4,000 prompts of 40 words: comparing them pairwise would take minutes.
    def many(word: str) -> list[Prompt]:
        return [prompt(" ".join(f"{word}{i}x{j}" for j in range(40)), name=f"{word}{i}") for i in range(4_000)]

    started = time.perf_counter()
    assert len(kept(*many("t"), heldout=many("h"))) == 4_000
    assert time.perf_counter() - started < 15
