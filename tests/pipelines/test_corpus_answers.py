"""Several answers to one prompt, where there are fewer prompts than responses are wanted."""

from collections import Counter
from pathlib import Path

import pytest

from distill.corpus import read_corpus
from pipelines.corpus import read_prompts
from tests.pipelines.tiny import Workplace, run


def _made(place: Workplace, *more: str) -> Path:
    text, code = run(place.words("corpus.temperature=1.0", *more, stage="corpus"))
    assert code == 0, text
    return place.only("corpus")


def test_prompts_are_gone_through_again_only_where_they_run_out(tiny_place: Workplace, tmp_path: Path) -> None:
    once = _made(tiny_place.again(tmp_path / "once"), "budget.responses=60")
    thrice = _made(tiny_place.again(tmp_path / "thrice"), "budget.responses=60", "corpus.answers=3")
    few = _made(tiny_place.again(tmp_path / "few"), "budget.responses=12", "corpus.answers=3")
    rows = {name: read_prompts(folder) for name, folder in (("once", once), ("thrice", thrice), ("few", few))}
    train = {name: [r.prompt for r in found if r.split == "train"] for name, found in rows.items()}
    texts = {p.id: p.turns for p in train["once"]}
    assert len(train["once"]) < 60 and not any("#" in p.id for p in train["few"])
    counts = Counter(p.id.partition("#")[0] for p in train["thrice"])
    assert set(counts) == set(texts) and max(counts.values()) <= 3
    assert len({p.id for p in train["thrice"]}) == len(train["thrice"]) == min(56, 3 * len(texts))
    assert all(p.turns == texts[p.id.partition("#")[0]] for p in train["thrice"])
    # No prompt has a third answer before all of its domain have a second one.
    for domain in {p.domain for p in train["thrice"]}:
        each = Counter(p.id.partition("#")[0] for p in train["thrice"] if p.domain == domain)
        assert max(each.values()) - min(each.values()) <= 1
    for split in ("validation", "heldout"):
        assert [r.prompt for r in rows["thrice"] if r.split == split and "#" in r.prompt.id] == []

    answers: dict[str, set[tuple[int, ...]]] = {}
    for sample in read_corpus(thrice):
        answers.setdefault(sample.id.partition("#")[0], set()).add(tuple(sample.tokens[sample.mask].tolist()))
    assert sum(len(found) > 1 for found in answers.values()) > len(texts) // 2, "further answers are other answers"


def test_a_source_may_have_a_number_of_its_own(tiny_place: Workplace, tmp_path: Path) -> None:
    folder = _made(
        tiny_place.again(tmp_path / "own"), "budget.responses=100", "corpus.answers=2", "prompts.jsonl.answers=4"
    )
    train = [row.prompt for row in read_prompts(folder) if row.split == "train"]
    for source in {p.source for p in train}:
        each = Counter(p.id.partition("#")[0] for p in train if p.source == source)
        assert set(each.values()) == {4 if source == "jsonl" else 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("corpus.answers=0",), "corpus.answers is 0: use at least 1"),
        (("corpus.answers=2", "corpus.temperature=0"), "greedy answers are all the same"),
        (
            ("prompts.jsonl.answers=2", "corpus.temperature=0"),
            "prompts.jsonl.answers is 2, but greedy answers are all the same",
        ),
        (("prompts.jsonl.answers=-1",), "answers is -1: use 0 for that of the corpus"),
    ],
)
def test_a_number_that_makes_no_sense_is_one_line(
    tiny_place: Workplace, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    text, code = run(tiny_place.again(tmp_path / "bad").words(*words, stage="corpus"))
    assert code == 2 and said in text and "Traceback" not in text
