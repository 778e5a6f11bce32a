"""A worked example tells of every token what the decoder made of it, and its pieces are the answer's own text."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from inference.drafters import Proposal, ReadsFeatures
from inference.drafters.lookup import LookupDrafter
from inference.errors import InputError
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.pair import Generated, Pair, load_pair
from inference.randomness import TorchSource
from inference.records import tokens_digest
from inference.sampling_settings import SamplingSettings
from inference.scoring import request_seed
from inference.target import target_digest
from pipelines.verify import Check, repeat
from pipelines.version_report.examples import (
    ACCEPTED,
    MOST,
    REJECTED,
    TARGET,
    Example,
    Token,
    pieces,
    read_examples,
    recorder,
    replay,
    write_examples,
)
from tests.inference.real import target_folder
from tests.pipelines.tiny import tokenizer, write_model

DRAFTS = [{"kind": "none"}, {"kind": "lookup", "longest": 3, "shortest": 1}, {"kind": "model"}]
PROMPT = "abc abc abc?"


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Pairs of one target."""
    target = write_model(tmp_path_factory.mktemp("target"), layers=2)

    def pair(draft: dict[str, object], **lookahead: Any) -> Pair:
        folder = tmp_path_factory.mktemp("pair")
        if draft["kind"] == "model":
            write_model(folder / "draft", layers=2, seed=0 if lookahead.get("same") else 1)
        (folder / "draft").mkdir(exist_ok=True)
        (folder / "draft" / "draft.json").write_text(json.dumps(draft), encoding="utf-8")
        settings = {"kind": "fixed", "tokens": 3, **{k: v for k, v in lookahead.items() if k != "same"}}
        info = {
            "schema_version": 1,
            "target": {"path": str(target), "revision": "", "digest": target_digest(target), "attention": "sdpa"},
            "draft": {"name": "made", "kind": draft["kind"]},
            "decoding": {"precision": "fp32", "lookahead": settings},
        }
        (folder / "pair.json").write_text(json.dumps(info), encoding="utf-8")
        return load_pair(folder, device="cpu", cache=folder / "cache")

    return pair


def check_of(pair: Pair, temperature: float, *, tokens: int = 40) -> Check:
    """A request with the digest that the pair gives it."""
    asked = Check("p1", None, PROMPT, temperature, "made", 0, tokens, 0, 1.0, 1.0, "")
    return replace(asked, digest=tokens_digest(repeat(pair, asked).tokens))


def generated(pair: Pair, check: Check) -> Generated:
    """The same request through the pair itself."""
    seed = request_seed(check.seed, check.prompt_id, check.temperature, check.arm)
    return pair.generate(check.user, temperature=check.temperature, max_new_tokens=check.max_new_tokens, seed=seed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", DRAFTS, ids=lambda draft: str(draft["kind"]))
@pytest.mark.parametrize("siblings", [[], [2, 1]], ids=["chain", "siblings"])
def test_kinds_and_text_are_what_the_decoder_counted(
    load: Callable[..., Pair], draft: dict[str, object], temperature: float, siblings: list[int]
) -> None:
    pair = load(draft, siblings=siblings)
    check = check_of(pair, temperature)
    found, told = replay(pair, check, domain="chat"), generated(pair, check)
    kinds = Counter(token.kind for token in found.tokens)
    decoded = told.decoded
    stood = sum(decoded.accepted) + sum(sum(ranks) for ranks in decoded.siblings)
    proposed = sum(length * rounds for length, rounds in decoded.blocks.items())
    assert found.answer == told.text
    assert kinds[ACCEPTED] == stood
    assert kinds[ACCEPTED] + kinds[TARGET] == len(decoded.tokens)
    assert kinds[REJECTED] == proposed - sum(decoded.accepted)
    assert found.tau == decoded.tau
    assert [token.round for token in found.tokens] == sorted(token.round for token in found.tokens)
    assert {token.round for token in found.tokens} == set(range(1, decoded.passes + 1))
    assert (found.prompt, found.domain, found.temperature) == (PROMPT, "chat", temperature)


def test_siblings_do_stand_in_what_is_tested_here(load: Callable[..., Pair]) -> None:
    pair = load({"kind": "model"}, siblings=[2, 1])
    decoded = generated(pair, check_of(pair, 1.0)).decoded
    assert sum(sum(ranks) for ranks in decoded.siblings) > 0 and sum(decoded.accepted) > 0


def test_a_draft_like_its_target_has_nothing_rejected_until_the_answer_ends(load: Callable[..., Pair]) -> None:
    pair = load({"kind": "model"}, same=True)
    found = replay(pair, check_of(pair, 0.0))
    last = found.tokens[-1].round
    assert not [token for token in found.tokens if token.kind == REJECTED and token.round < last]
    # Blocks of three, and the token that the target adds to each.
    assert [token.kind for token in found.tokens][:4] == [ACCEPTED, ACCEPTED, ACCEPTED, TARGET]


def test_other_tokens_than_the_score_are_refused(load: Callable[..., Pair], tmp_path: Path) -> None:
    pair = load({"kind": "none"})
    wrong = replace(check_of(pair, 0.0), digest="0" * 16)
    with pytest.raises(InputError, match="p1 at temperature 0 gave other tokens than its score"):
        write_examples(pair, [wrong], tmp_path / "examples.json")
    assert not list(tmp_path.iterdir()), "nothing half-written"
    # Of captured rounds sampled answers are others, so that nothing is wrong.
    shown = replay(pair, replace(wrong, captured_positions=64))
    assert shown.answer == generated(pair, wrong).text


def test_what_is_written_is_read_back(load: Callable[..., Pair], tmp_path: Path) -> None:
    pair, path = load({"kind": "lookup", "longest": 3, "shortest": 1}), tmp_path / "examples.json"
    check = check_of(pair, 0.0, tokens=8)
    write_examples(pair, [check] * (MOST + 1), path, domains={"p1": "maths"})
    found = read_examples(path)
    assert found == [replay(pair, check, domain="maths")] * MOST
    assert read_examples(tmp_path / "none.json") == []
    path.write_text('[{"prompt": "a"}]', encoding="utf-8")
    with pytest.raises(InputError, match="not a list of examples"):
        read_examples(path)


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    words = tokenizer()
    text = "a\u00e9\u6f22b\U0001f642"
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 1 + 4, "a token a byte"
    expected = ["a", "", "\u00e9", "", "", "\u6f22", "b", "", "", "", "\U0001f642"]
    assert pieces(words, ids) == expected
    assert pieces(words, ids, start=3) == expected[3:]


def test_an_answer_that_ends_inside_a_character_keeps_all_its_text() -> None:
    words = tokenizer()
    ids = words("a\u6f22", add_special_tokens=False)["input_ids"][:-1]
    found = pieces(words, ids)
    assert "".join(found) == words.decode(ids) and found[0] == "a"


class Tidying:
    """A tokenizer whose text of two tokens agrees less with the text of three than that of one does."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return ("", "ab", "a b", "abc")[len(ids)]


def test_pieces_join_also_where_a_tokenizer_tidies_up_behind_itself() -> None:
    assert pieces(Tidying(), [1, 2, 3]) == ["ab", "", "c"]  # type: ignore[arg-type]


def test_special_tokens_have_no_text() -> None:
    words = tokenizer()
    ids = [*words("ab", add_special_tokens=False)["input_ids"], words.eos_token_id]
    assert pieces(words, ids) == ["a", "b", ""]


class Reader(LookupDrafter):
    """A draft that reads features, and notes what it was given."""

    taps = (1,)

    def __init__(self) -> None:
        super().__init__(LookupSettings(longest=3, shortest=1))
        self.given: list[torch.Tensor] = []

    def read(self, features: torch.Tensor) -> None:
        self.given.append(features)


def test_a_draft_that_reads_features_goes_on_reading_them() -> None:
    inner = Reader()
    wrapped = recorder(inner)
    assert isinstance(wrapped, ReadsFeatures) and wrapped.taps == (1,)
    wrapped.read(torch.zeros(2, 4))
    assert len(inner.given) == 1
    assert not isinstance(recorder(LookupDrafter(LookupSettings(longest=3, shortest=1))), ReadsFeatures)
    assert wrapped.kind == inner.kind and wrapped.nbytes() == inner.nbytes()


def test_the_recorder_changes_no_proposal() -> None:
    context = torch.tensor([1, 2, 3, 1, 2])
    options: dict[str, Any] = {"limit": 2, "lookahead": FixedLookahead(2), "settings": SamplingSettings()}
    proposals: list[Proposal] = []
    for drafter in (
        LookupDrafter(LookupSettings(longest=3, shortest=1)),
        recorder(LookupDrafter(LookupSettings(longest=3, shortest=1))),
    ):
        drafter.begin(context)
        source = TorchSource.seeded(0, device=context.device)
        proposals.append(drafter.propose(context, generator=source, **options))
    assert proposals[0].tokens.tolist() == proposals[1].tokens.tolist() == [3, 1]


def test_the_answer_leaves_rejected_tokens_out() -> None:
    tokens = [Token("a", ACCEPTED, 1), Token("x", REJECTED, 1), Token("b", TARGET, 1)]
    assert Example("p", "", 0.0, 2.0, tokens).answer == "ab"


@pytest.mark.real
@pytest.mark.parametrize(
    "text",
    ["Why is na\u00efve \u6f22\u5b57 \U0001f9d1\u200d\U0001f680 rare?", "def f(x):\n    return  x  # a . b , c !"],
)
def test_pieces_of_the_embedded_targets_tokenizer_join_to_its_text(text: str) -> None:
    words = AutoTokenizer.from_pretrained(target_folder())
    ids = words(text)["input_ids"]
    found = pieces(words, ids)
    assert "".join(found) == words.decode(ids, skip_special_tokens=True) == text
    assert len(found) == len(ids)
