"""Conversations that the target answers itself: ids are the template's, states belong to their tokens."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from distill.chat import conversation_tokens, render_prompt
from distill.corpus import Sample
from distill.prompts import Prompt
from distill.responses._context import AnswerContext
from distill.responses.local import Config
from inference.attention import use_grouped_attention
from inference.generation import Response
from inference.model import CausalModel
from tests.inference.families import family_model

TWO_TURNS = Prompt(id="p", domain="chat", source="made", turns=("one?", "two?"))
ONE_TURN = Prompt(id="q", domain="code", source="made", turns=("only?",), system="Be brief.")


def _model(tokenizer: PreTrainedTokenizerFast) -> CausalModel:
    model = family_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    use_grouped_attention(model.model)
    return model


def _context(tokenizer: PreTrainedTokenizerFast, *stops: str) -> AnswerContext:
    vocabulary = tokenizer.get_vocab()
    ids = frozenset(vocabulary[token] for token in ("<|im_end|>", *stops))
    return AnswerContext(tokenizer=tokenizer, stop_tokens=ids, model=_model(tokenizer))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, chatml: PreTrainedTokenizerFast) -> Callable[..., list[list[int]]]:
    """Let the target write set texts, one list a turn; returns the prompts it was given."""

    def put(*turns: list[str]) -> list[list[int]]:
        waiting, given = list(turns), list[list[int]]()

        def answer(model: object, prompts: list[list[int]], wanted: object, **_: object) -> list[Response]:
            given.extend(list(p) for p in prompts)
            ids = [chatml(text, add_special_tokens=False)["input_ids"] for text in waiting.pop(0)]
            assert len(ids) == len(prompts)
            # State j of a response is the number j, to be recognised again.
            return [Response(i, torch.arange(float(len(i)))[:, None]) for i in ids]

        monkeypatch.setattr("inference.answers.answer_all", answer)
        return given

    return put


def _answer(prompts: list[Prompt], context: AnswerContext, **config: object) -> list[Sample]:
    splits = ["train"] * len(prompts)
    return Config(**config).answer(prompts, splits=splits, context=context, seed=0)  # type: ignore[arg-type]


def _text(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids.tolist()))


def test_ids_and_mask_are_those_of_the_rendered_conversation(
    chatml: PreTrainedTokenizerFast, script: Callable[..., list[list[int]]]
) -> None:
    script(["first answer<|im_end|>", "other\n\nanswer<|im_end|>"], ["second<|im_end|>"])
    two, one = _answer([TWO_TURNS, ONE_TURN], _context(chatml))
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second"},
    ]
    ids, mask = conversation_tokens(chatml, messages)
    # The template ends with a line break behind the last turn, which the target never writes.
    assert (two.tokens.tolist(), two.mask.tolist()) == (ids[:-1], mask[:-1])
    assert (two.id, two.domain, two.source, two.split, two.text) == ("p", "chat", "made", "train", "second")
    single = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "only?"},
        {"role": "assistant", "content": "other\n\nanswer"},
    ]
    ids, mask = conversation_tokens(chatml, single)
    assert (one.tokens.tolist(), one.mask.tolist()) == (ids[:-1], mask[:-1])


def test_each_turn_is_asked_with_what_was_said_before(
    chatml: PreTrainedTokenizerFast, script: Callable[..., list[list[int]]]
) -> None:
    given = script(["first<|im_end|>"], ["second<|im_end|>"])
    _answer([TWO_TURNS], _context(chatml))
    conversation = [{"role": "user", "content": "one?"}]
    assert given[0] == render_prompt(chatml, conversation)
    conversation += [{"role": "assistant", "content": "first"}, {"role": "user", "content": "two?"}]
    assert given[1] == render_prompt(chatml, conversation)


def test_an_answer_cut_by_its_length_is_closed_by_the_template(
    chatml: PreTrainedTokenizerFast, script: Callable[..., list[list[int]]]
) -> None:
    given = script(["cut off"], ["second<|im_end|>"])
    (sample,) = _answer([TWO_TURNS], _context(chatml))
    assert "cut off<|im_end|>\n<|im_start|>user\ntwo?" in _text(chatml, torch.tensor(given[1]))
    # The template's closing token is not the target's own.
    assert _text(chatml, sample.tokens[sample.mask]) == "cut offsecond<|im_end|>"


def test_a_stop_token_of_another_format_is_taken_back_before_the_next_turn(
    chatml: PreTrainedTokenizerFast, script: Callable[..., list[list[int]]]
) -> None:
    given = script(["first<s>"], ["second<s>"])
    (sample,) = _answer([TWO_TURNS], _context(chatml, "<s>"))
    assert "first<|im_end|>\n" in _text(chatml, torch.tensor(given[1])) and "<s>" not in _text(
        chatml, torch.tensor(given[1])
    )
    # At the end of the conversation it stays: the target wrote it.
    assert _text(chatml, sample.tokens[sample.mask]) == "firstsecond<s>"
    # Its state went with it: 5 of 6, then 7.
    assert sample.states is not None
    assert sample.states[:, 0].tolist() == [*range(5), *range(7)]


def test_an_answer_of_a_stop_token_alone_is_an_empty_turn(
    chatml: PreTrainedTokenizerFast, script: Callable[..., list[list[int]]]
) -> None:
    given = script(["<s>"], ["second<|im_end|>"])
    (sample,) = _answer([TWO_TURNS], _context(chatml, "<s>"))
    assert "<|im_start|>assistant\n<|im_end|>\n" in _text(chatml, torch.tensor(given[1]))
    assert sample.states is not None and sample.states.shape[0] == int(sample.mask.sum())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompts", [True, False])
def test_states_are_those_of_a_pass_over_the_whole_conversation(
    chatml: PreTrainedTokenizerFast, temperature: float, prompts: bool
) -> None:
    context = _context(chatml, "a", "b")  # stop tokens enough for turns of several lengths
    samples = _answer(
        [TWO_TURNS, ONE_TURN], context, temperature=temperature, max_new_tokens=20, keep_prompt_states=prompts
    )
    assert context.model is not None
    for sample in samples:
        with torch.inference_mode():
            states = context.model.states(sample.tokens[None])[0]
        # The state before a token predicted it.
        expected = states[sample.mask.nonzero()[:, 0] - 1]
        torch.testing.assert_close(sample.states_of(sample.mask), expected, rtol=1e-9, atol=1e-9)
        assert int(sample.stated.sum()) == (len(sample.tokens) - 1 if prompts else int(sample.mask.sum()))
        if prompts:
            torch.testing.assert_close(sample.states, states[:-1], rtol=1e-9, atol=1e-9)
        if temperature == 0.0:
            with torch.inference_mode():
                assert torch.equal(context.model.head(expected).argmax(-1), sample.tokens[sample.mask])


def test_states_are_left_out_on_request(chatml: PreTrainedTokenizerFast) -> None:
    (sample,) = _answer([ONE_TURN], _context(chatml), keep_states=False, max_new_tokens=4)
    assert sample.states is None and bool(sample.mask.any())


def test_a_seed_fixes_the_shard(chatml: PreTrainedTokenizerFast) -> None:
    def tokens(seed: int) -> list[list[int]]:
        samples = Config(max_new_tokens=12, temperature=1.5).answer(
            [TWO_TURNS, ONE_TURN], splits=["train", "validation"], context=_context(chatml), seed=seed
        )
        assert [s.split for s in samples] == ["train", "validation"]
        return [s.tokens.tolist() for s in samples]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "must be at least 1, got 0, 32"),
        ({"batch_size": 0}, "must be at least 1, got 128, 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperatures": [0.8, 0.0]}, "each must be above 0"),
        ({"temperatures": [math.inf]}, "each must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**values)  # type: ignore[arg-type]


def test_conversations_take_temperatures_by_turns_and_keep_theirs(
    chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[tuple[int, ...], float] = {}

    def answer(model: object, prompts: list[list[int]], wanted: object, **told: object) -> list[Response]:
        temperatures = told["temperatures"]
        assert isinstance(temperatures, list)
        for prompt, temperature in zip(prompts, temperatures, strict=True):
            assert asked.setdefault(tuple(prompt), temperature) == temperature  # whoever is answered along with it
        return [Response([5]) for _ in prompts]

    monkeypatch.setattr("inference.answers.answer_all", answer)
    many = [Prompt(f"p/{number}", "chat", "here", (f"question {number}",)) for number in range(40)]
    config = {"temperatures": [0.8, 0.25], "keep_states": False, "keep_features": False}
    _answer(many, _context(chatml), **config)
    _answer(many[::-3], _context(chatml), **config)
    assert len(asked) == 40 and 10 <= sum(temperature == 0.25 for temperature in asked.values()) <= 30
    assert set(asked.values()) == {0.8, 0.25}
    # Several answers to a prompt differ where any is drawn.
    assert Config(answers=3, temperature=0.0, temperatures=[0.5]).settings().temperature == 0.5


def test_the_target_is_needed_here() -> None:
    assert Config().needs_target()


@pytest.mark.parametrize(
    ("batch", "size", "shard"),
    [(1, 0, 4), (32, 0, 128), (100, 0, 256), (512, 0, 512), (4, 4, 4), (4, 10, 10), (8, 4, 8)],
)
def test_a_shard_is_some_batches_but_not_too_many_conversations(batch: int, size: int, shard: int) -> None:
    assert Config(batch_size=batch, shard_size=size).conversations_per_shard() == shard
