"""One set of prompts out of many sources."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from distill.prompts import Prompt, SourceConfig, SourceContext
from distill.splits import PromptSet, prepare_prompts, prompts_digest
from inference.errors import InputError

CONTEXT = SourceContext(tokenizer=None, seed=1)  # type: ignore[arg-type]
LONG = "alpha beta gamma delta epsilon zeta eta theta iota kappa"


@dataclass
class Texts(SourceConfig):
    """A source of given texts."""

    kind: str = "texts"
    texts: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def read(self, context: SourceContext) -> list[Prompt]:
        names = self.ids or [str(i) for i in range(len(self.texts))]
        return [
            Prompt(name, self.domain, self.kind, (text,), heldout=self.heldout)
            for name, text in zip(names, self.texts, strict=True)
        ]


def questions(word: str, number: int) -> list[str]:
    return [f"{word} question {i}" for i in range(number)]


def prepare(share: float = 0.1, seed: int = 0, **sources: Texts) -> PromptSet:
    return prepare_prompts(sources, CONTEXT, validation_share=share, seed=seed)


HELDOUT = Texts(texts=questions("held", 5), heldout=True)


def names(prompts: Sequence[Prompt]) -> set[str]:
    return {p.id for p in prompts}


def test_each_prompt_lands_in_exactly_one_split() -> None:
    result = prepare(chat=Texts(texts=questions("chat", 50)), code=Texts(texts=questions("code", 30)), test=HELDOUT)
    assert len(result.train) + len(result.validation) == 80
    assert not names(result.train) & names(result.validation)
    assert names(result.heldout) == {f"test/{i}" for i in range(5)}
    assert all(p.heldout for p in result.heldout)
    assert not any(p.heldout for p in result.train + result.validation)


def test_validation_takes_its_share_of_every_domain() -> None:
    result = prepare(
        chat=Texts(texts=questions("chat", 50)),
        code=Texts(texts=questions("code", 30), domain="code"),
        maths=Texts(texts=questions("maths", 2), domain="maths"),
        one=Texts(texts=["lonely"], domain="one"),
        test=HELDOUT,
    )
    # 10% of 50 and of 30; a tenth of 2 rounds to none, but a domain with two gives one; a single prompt stays in train.
    assert result.counts["validation"] == {"chat": 5, "code": 3, "maths": 1}
    assert result.counts["train"] == {"chat": 45, "code": 27, "maths": 1, "one": 1}
    assert result.counts["heldout"] == {"chat": 5}
    assert list(result.by_domain("train")) == ["chat", "code", "maths", "one"]


def test_no_validation_when_none_is_asked_for() -> None:
    assert prepare(0.0, chat=Texts(texts=questions("chat", 9)), test=HELDOUT).validation == []


def test_another_seed_splits_otherwise_and_the_same_one_alike() -> None:
    def validation(seed: int) -> set[str]:
        return names(prepare(seed=seed, chat=Texts(texts=questions("chat", 50)), test=HELDOUT).validation)

    assert validation(0) == validation(0) != validation(1)


def test_ids_carry_the_name_of_the_source() -> None:
    result = prepare(0.0, one=Texts(texts=["a"]), two=Texts(texts=["b"]), test=HELDOUT)
    assert [(p.id, p.source) for p in result.train] == [("one/0", "one"), ("two/0", "two")]


def test_two_prompts_with_one_id_are_refused() -> None:
    with pytest.raises(InputError, match=r"1 ids occur more than once, 'x' among them \[prompts.one\]"):
        prepare(one=Texts(texts=["a", "b"], ids=["x", "x"]), test=HELDOUT)


def test_training_prompts_that_overlap_with_held_out_ones_go() -> None:
    test = Texts(texts=[f"Say {LONG} now"], heldout=True)
    result = prepare(0.0, chat=Texts(texts=["fine", f"well, {LONG}"]), test=test)
    assert names(result.train) == {"chat/0"}
    assert result.report.sources["chat"].contaminated == 1


def test_a_limit_on_held_out_prompts_does_not_let_the_others_into_training() -> None:
    texts = [*questions("held", 20), LONG]
    for seed in range(3):
        context = replace(CONTEXT, seed=seed)
        sources = {
            "chat": Texts(texts=["fine", f"{LONG} again"]),
            "test": Texts(texts=texts, heldout=True, limit=1),
        }
        result = prepare_prompts(sources, context, validation_share=0.0, seed=0)
        assert len(result.heldout) == 1
        assert names(result.train) == {"chat/0"}


def test_a_limit_on_training_prompts_holds() -> None:
    assert len(prepare(0.0, chat=Texts(texts=questions("chat", 50), limit=7), test=HELDOUT).train) == 7


def test_equal_held_out_prompts_count_once() -> None:
    test = Texts(texts=["Why?", "why? "], heldout=True)
    assert names(prepare(chat=Texts(texts=["a", "b"]), test=test).heldout) == {"test/0"}


def test_no_held_out_prompt_is_refused() -> None:
    with pytest.raises(InputError, match=r"no held-out prompts in chat \[prompts\]: add a source with heldout=true"):
        prepare(chat=Texts(texts=["a"]))
    with pytest.raises(InputError, match="no held-out prompts in an empty list of sources"):
        prepare()


def test_no_training_prompt_left_is_refused() -> None:
    with pytest.raises(InputError, match=r"no training prompts are left \(1 loaded\)"):
        prepare(chat=Texts(texts=[LONG]), test=Texts(texts=[LONG], heldout=True))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="0 <= validation_share < 1"):
        prepare(share, chat=Texts(texts=["a"]), test=HELDOUT)


def test_digests_tell_sets_apart() -> None:
    first = prepare(chat=Texts(texts=questions("chat", 9)), test=HELDOUT)
    same = prepare(chat=Texts(texts=questions("chat", 9)), test=HELDOUT)
    other = prepare(chat=Texts(texts=questions("Chat", 9)), test=HELDOUT)
    assert first.digests == same.digests
    assert set(first.digests) == {"train", "validation", "heldout"}
    assert first.digests["train"] != other.digests["train"]
    assert first.digests["heldout"] == other.digests["heldout"]


def test_a_digest_depends_on_every_part_of_a_prompt() -> None:
    prompt = Prompt("1", "chat", "test", ("a", "b"))
    variants = [
        prompt,
        replace(prompt, id="2"),
        replace(prompt, domain="code"),
        replace(prompt, turns=("ab",)),
        replace(prompt, system=""),
        replace(prompt, system="s"),
    ]
    assert len({prompts_digest([variant]) for variant in variants}) == len(variants)
