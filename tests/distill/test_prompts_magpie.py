"""The target as the user: what is sampled, what is dropped, when it gives up."""

import logging
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from distill.chat import user_prefix
from distill.prompts import SourceContext
from distill.prompts.magpie import Config, repeats
from inference.errors import InputError

GOOD = "How do I bake bread without an oven at home?"


def writing(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[SourceContext, list[tuple[object, ...]]]:
    """A target that writes the given texts one after another, over and over; and the calls made to it."""
    calls: list[tuple[object, ...]] = []

    def sample(prompts: list[list[int]], tokens: int, temperature: float, seed: int) -> list[list[int]]:
        start = sum(len(call[0]) for call in calls)  # type: ignore[arg-type]
        calls.append((prompts, tokens, temperature, seed))
        chosen = [texts[(start + i) % len(texts)] for i in range(len(prompts))]
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"])[:tokens] for text in chosen]

    return SourceContext(tokenizer, 5, sample), calls


def test_it_samples_behind_the_templates_user_prefix(chatml: PreTrainedTokenizerFast) -> None:
    context, calls = writing(chatml, [f"{GOOD} Take {i}." for i in range(10)])
    found = Config(limit=3, batch_prompts=2, temperature=0.7).load(context)
    assert [p.turns[0] for p in found] == [f"{GOOD} Take {i}." for i in range(3)]
    assert [p.id for p in found] == ["0", "1", "2"]
    assert [call[:3] for call in calls] == [([user_prefix(chatml)] * 2, 128, 0.7)] * 2
    assert calls[0][3] != calls[1][3], "every batch has a seed of its own"


def test_a_system_message_is_written_under_and_kept(chatml: PreTrainedTokenizerFast) -> None:
    context, calls = writing(chatml, [GOOD])
    found = Config(limit=1, batch_prompts=1, system="You teach Latin.").load(context)
    assert found[0].system == "You teach Latin."
    assert calls[0][0] == [user_prefix(chatml, system="You teach Latin.")]


def test_topics_are_written_under_by_turns_and_not_answered_under(chatml: PreTrainedTokenizerFast) -> None:
    context, calls = writing(chatml, [f"{GOOD} Take {i}." for i in range(10)])
    topics = ["You teach Latin.", "You mend bicycles."]
    found = Config(limit=6, batch_prompts=2, topics=topics, system="You are kind.").load(context)
    asked = [user_prefix(chatml, system=topic) for topic in (*topics, topics[0])]
    assert [call[0] for call in calls] == [[prefix] * 2 for prefix in asked]
    assert {prompt.system for prompt in found} == {"You are kind."}
    with pytest.raises(ValueError, match="a topic is empty"):
        Config(topics=["You teach Latin.", " "])


def test_the_same_seed_gives_the_same_calls(chatml: PreTrainedTokenizerFast) -> None:
    runs = []
    for _ in range(2):
        context, calls = writing(chatml, [GOOD, "short"])
        Config(limit=1, batch_prompts=1).load(context)
        runs.append(calls)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, ""),
        ("Hi?", "length"),
        ("Why? " * 300, "length"),
        ("Tell me a joke.<|im_end|>\n<|im_start|>assistant", "template markers"),
        ("Warum ist \u00fcber \u00e4hnlich sch\u00f6n und gr\u00f6\u00dfer?", "language"),
        (
            "\u4e3a\u4ec0\u4e48\u5929\u7a7a\u662f\u84dd\u8272\u7684\uff1f\u8bf7\u544a\u8bc9\u6211\u4e3a\u4ec0\u4e48\u3002",
            "language",
        ),
        ("12 + 34 * 56 / 78 - 90 = 12345", "few letters"),
        ("I like it very much. " * 10, "repetition"),
        ("Aaaaaaaaaaaaaaaaaaaaaaah what is that?", "repetition"),
        ("Do this now.\nDo this now.\nDo this now.", "repetition"),
    ],
)
def test_a_turn_is_dropped_for_a_reason(chatml: PreTrainedTokenizerFast, text: str, reason: str) -> None:
    from distill.chat import template_markers

    assert Config().fault(text.strip(), markers=template_markers(chatml)) == reason


def test_any_language_passes_when_asked(chatml: PreTrainedTokenizerFast) -> None:
    text = "\u0428\u0442\u043e \u044d\u0442\u043e \u0442\u0430\u043a\u043e\u0435, \u0441\u043a\u0430\u0436\u0438?"
    assert Config(min_ascii_share=0.0).fault(text, markers=()) == ""


def test_prose_does_not_count_as_repetition() -> None:
    assert not repeats("Write a function that takes a list of numbers and returns the sum of the even numbers in it.")


def test_drops_are_counted(chatml: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    # "Again" differs from GOOD in case and punctuation only; the last one fills all 60 tokens, so it did not end.
    again = GOOD.upper().replace("?", " ...")
    context, _ = writing(chatml, [GOOD, again, "short", "What is the meaning of this very long sentence " * 3])
    with caplog.at_level(logging.INFO):
        found = Config(limit=2, batch_prompts=4, max_new_tokens=60, max_attempts=2).load(context)
    assert [p.turns[0] for p in found] == [GOOD]
    assert "4 turns sampled, 1 kept" in caplog.text
    assert all(f"1 {reason}" in caplog.text for reason in ("duplicate", "length", "unfinished"))
    assert "1 of 2 prompts after 4 samples" in caplog.text


def test_it_gives_up_when_nothing_passes(chatml: PreTrainedTokenizerFast) -> None:
    context, calls = writing(chatml, ["short"])
    with pytest.raises(InputError, match=r"none of 8 turns .* passed the filters \(dropped: 8 length\)"):
        Config(limit=2, batch_prompts=4, max_attempts=4).load(context)
    assert len(calls) == 2


def test_without_a_target_it_says_so(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="no target to write prompts"):
        Config().load(SourceContext(chatml, 0))


def test_without_a_chat_template_it_says_so(
    make_tokenizer: Callable[[str | None], PreTrainedTokenizerFast], chatml: PreTrainedTokenizerFast
) -> None:
    context, _ = writing(chatml, [GOOD])
    with pytest.raises(InputError, match="no chat template"):
        Config().load(SourceContext(make_tokenizer(None), 0, context.sample))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": -1}, "never stops writing: say how many"),
        ({"temperature": 0.0}, "use one above 0"),
        ({"min_chars": 9, "max_chars": 8}, "min_chars <= max_chars"),
        ({"batch_prompts": 0}, "must be at least 1"),
        ({"min_ascii_share": 1.5}, "use 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)  # type: ignore[arg-type]
