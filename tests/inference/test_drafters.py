"""What drafters propose and remember, and which draft folders are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from inference.drafters import Drafter, LoadContext, Proposal, ReadsFeatures, load_drafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import MixedDrafter, mixed_drafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.loading import load_causal_model
from inference.lookahead import Lookahead
from inference.lookahead.confidence import ConfidenceLookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.sampling import token_probs
from inference.sampling_settings import SamplingSettings
from tests.inference.families import family_model
from tests.pipelines.tiny import tokenizer, write_model

CPU = torch.device("cpu")
GREEDY = SamplingSettings()


def _propose(
    drafter: Drafter,
    context: list[int],
    *,
    limit: int = 4,
    lookahead: Lookahead | None = None,
    settings: SamplingSettings = GREEDY,
) -> Proposal:
    return drafter.propose(
        torch.tensor(context),
        limit=limit,
        lookahead=lookahead or FixedLookahead(8),
        settings=settings,
        generator=TorchSource.seeded(0),
    )


def _lookup(prompt: list[int], *, longest: int = 3, shortest: int = 1) -> LookupDrafter:
    drafter = LookupDrafter(LookupSettings(longest=longest, shortest=shortest))
    drafter.begin(torch.tensor(prompt))
    return drafter


def test_lookup_proposes_what_followed_the_longest_match() -> None:
    # The suffix 1 2 was followed by 3 4; the suffix 2 alone, later, by 9.
    context = [1, 2, 3, 4, 7, 2, 9, 1, 2]
    assert _propose(_lookup(context), context, limit=2).tokens.tolist() == [3, 4]
    assert _propose(_lookup(context, longest=1), context, limit=2).tokens.tolist() == [9, 1]


def test_lookup_takes_the_latest_occurrence() -> None:
    context = [1, 2, 3, 1, 2, 4, 1, 2]
    assert _propose(_lookup(context), context, limit=1).tokens.tolist() == [4]


def test_lookup_has_nothing_to_say_about_a_new_suffix() -> None:
    proposal = _propose(_lookup([1, 2, 3, 4]), [1, 2, 3, 4])
    assert (len(proposal), proposal.probs) == (0, None)


def test_lookup_ignores_suffixes_shorter_than_asked() -> None:
    context = [1, 2, 3, 9, 3]
    assert _propose(_lookup(context, shortest=1), context, limit=1).tokens.tolist() == [9]
    assert len(_propose(_lookup(context, shortest=2), context)) == 0


def test_lookup_never_proposes_beyond_what_was_written() -> None:
    # After the match at position 0 only 5 5 was written: two tokens, not four.
    context = [5, 5, 5]
    assert _propose(_lookup(context), context, limit=4).tokens.tolist() == [5]


def test_lookup_learns_verified_tokens_as_they_come() -> None:
    drafter = _lookup([1, 2, 3])
    assert len(_propose(drafter, [1, 2, 3])) == 0
    assert _propose(drafter, [1, 2, 3, 8, 9, 1, 2, 3], limit=2).tokens.tolist() == [8, 9]


def test_lookup_forgets_the_previous_request() -> None:
    drafter = _lookup([1, 2, 3, 1, 2])
    drafter.begin(torch.tensor([1, 2]))
    assert len(_propose(drafter, [1, 2])) == 0


def test_lookup_is_silent_where_nothing_may_be_proposed() -> None:
    context = [1, 2, 1, 2, 1]
    assert len(_propose(_lookup(context), context, limit=0)) == 0
    assert len(_propose(_lookup(context), context, lookahead=FixedLookahead(0))) == 0


def test_lookup_confidence_follows_what_became_of_earlier_matches() -> None:
    context = [1, 2, 3, 4, 5, 6, 1]
    drafter = _lookup(context, longest=1)

    def kept(threshold: float) -> int:
        return len(_propose(drafter, context, limit=1, lookahead=ConfidenceLookahead(8, threshold=threshold)))

    # Nothing known: (0 + 1) / (0 + 2).
    assert (kept(0.5), kept(0.51)) == (1, 0)
    # The match says 2 3 4 5 6 1; four of them come, and the match that follows says 6 first: 5 / 6.
    context = [*context, 2, 3, 4, 5]
    assert (kept(0.83), kept(0.84)) == (1, 0)
    # That one says 6 1 2 3 4 5: the first comes, the second does not, the rest is not judged: (5 + 1) / (6 + 2).
    context = [*context, 6, 5]
    assert (kept(0.75), kept(0.76)) == (1, 0)


def test_lookup_learns_from_rounds_that_others_proposed() -> None:
    drafter = _lookup([1, 2, 3, 1], longest=1)
    assert drafter.chance(torch.tensor([1, 2, 3, 1])) == 0.5
    # The match said 2 3 1: two of two tokens came true, and one more of the next match, which said 3 1 2.
    assert drafter.chance(torch.tensor([1, 2, 3, 1, 2, 3])) == 3 / 4
    assert drafter.chance(torch.tensor([1, 2, 3, 1, 2, 3, 1])) == 4 / 5
    assert drafter.chance(torch.tensor([1, 2, 3, 1, 2, 3, 1, 7])) == 0.0
    drafter.begin(torch.tensor([1, 2, 1]))
    assert drafter.chance(torch.tensor([1, 2, 1])) == 0.5


def test_lookup_confidence_shrinks_along_the_block() -> None:
    context = [1, 2, 3, 4, 5, 6, 1]
    # 1/2, 1/4, 1/8: a threshold of 0.2 is met twice.
    proposal = _propose(_lookup(context, longest=1), context, lookahead=ConfidenceLookahead(8, threshold=0.2))
    assert proposal.tokens.tolist() == [2, 3]


def test_lookup_keeps_confidence_apart_by_length_of_match() -> None:
    context = [1, 2] * 10
    drafter = _lookup(context, longest=2)
    _propose(drafter, context, limit=4)
    policy = ConfidenceLookahead(8, threshold=0.45)
    # The match of two fails: 1 / 3. A match of one token is untried: 1 / 2.
    context = [*context, 7, 2]
    assert len(_propose(drafter, context, limit=1, lookahead=policy)) == 1
    # It is right, and the match of two that follows has its own record.
    context = [*context, 1]
    assert len(_propose(drafter, context, limit=1, lookahead=policy)) == 0


@pytest.mark.parametrize(("longest", "shortest"), [(2, 3), (1, 0), (0, 0)])
def test_lookup_settings_are_checked(longest: int, shortest: int) -> None:
    with pytest.raises(ValueError, match=f"need 1 <= shortest <= longest, got {shortest} and {longest}"):
        LookupSettings(longest=longest, shortest=shortest)


@pytest.fixture
def model() -> CausalModel:
    return family_model("llama")


def _rows(model: CausalModel, context: list[int]) -> torch.Tensor:
    """All rows of an uncached pass, `[T, V]`."""
    with torch.inference_mode():
        rows: torch.Tensor = model.model(input_ids=torch.tensor([context]), use_cache=False).logits[0]
    return rows


def test_model_drafter_proposes_its_own_greedy_continuation(model: CausalModel) -> None:
    drafter, context = ModelDrafter(model), [4, 9, 2]
    drafter.begin(torch.tensor(context))
    proposal = _propose(drafter, context)
    written = list(context)
    for token in proposal.tokens.tolist():
        assert token == int(_rows(model, written)[-1].argmax())
        written.append(token)
    assert proposal.probs is None


def test_model_drafter_hands_over_the_rows_it_sampled_from(model: CausalModel) -> None:
    settings = SamplingSettings(temperature=0.7, top_k=9, top_p=0.9, repetition_penalty=1.2)
    drafter, context = ModelDrafter(model), torch.tensor([4, 9, 2])
    drafter.begin(context)
    proposal = _propose(drafter, context.tolist(), settings=settings)
    rows = _rows(model, [*context.tolist(), *proposal.tokens.tolist()])[2:]
    expected = token_probs(rows, context=context, block=proposal.tokens, settings=settings)[: len(proposal)]
    assert proposal.probs is not None and len(proposal) == 4
    torch.testing.assert_close(proposal.probs, expected, rtol=1e-9, atol=1e-12)
    assert bool((proposal.probs.gather(1, proposal.tokens[:, None]) > 0).all())


@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
def test_model_drafter_cache_after_a_verdict_holds_verified_tokens_only(model: CausalModel, accepted: int) -> None:
    drafter, context = ModelDrafter(model), [4, 9, 2]
    drafter.begin(torch.tensor(context))
    tokens = _propose(drafter, context).tokens.tolist()
    # Context and three of four proposed tokens were fed; the fourth never is.
    assert drafter.cache.length == 6
    drafter.rollback(accepted)
    assert drafter.cache.length == min(6, 3 + accepted)
    # The next block starts from the accepted tokens and the target's own: as a fresh drafter would.
    longer = [*context, *tokens[:accepted], 11]
    fresh = ModelDrafter(model)
    fresh.begin(torch.tensor(longer))
    assert _propose(drafter, longer).tokens.tolist() == _propose(fresh, longer).tokens.tolist()


@pytest.mark.parametrize("limit", [0, 4])
def test_model_drafter_catches_up_after_rounds_without_a_proposal(model: CausalModel, limit: int) -> None:
    drafter, context = ModelDrafter(model), [4, 9, 2]
    drafter.begin(torch.tensor(context))
    policy = ConfidenceLookahead(4, threshold=1.0)  # nothing is ever that certain
    for token in (5, 6, 7):
        assert len(_propose(drafter, context, limit=limit, lookahead=policy)) == 0
        drafter.rollback(0)
        context = [*context, token]
    fresh = ModelDrafter(model)
    fresh.begin(torch.tensor(context))
    assert _propose(drafter, context).tokens.tolist() == _propose(fresh, context).tokens.tolist()


def test_model_drafter_confidence_is_its_largest_probability(model: CausalModel) -> None:
    drafter, context = ModelDrafter(model), [4, 9, 2]
    drafter.begin(torch.tensor(context))
    largest = float(torch.softmax(_rows(model, context)[-1], -1).max())
    drafter.begin(torch.tensor(context))
    assert len(_propose(drafter, context, limit=1, lookahead=ConfidenceLookahead(4, threshold=largest - 1e-6))) == 1
    drafter.begin(torch.tensor(context))
    assert len(_propose(drafter, context, limit=1, lookahead=ConfidenceLookahead(4, threshold=largest + 1e-6))) == 0


def test_model_drafter_counts_weights_and_cache(model: CausalModel) -> None:
    drafter = ModelDrafter(model)
    assert drafter.nbytes() == model.nbytes()
    drafter.begin(torch.tensor([1, 2, 3]))
    assert drafter.nbytes() == model.nbytes() + drafter.cache.nbytes() > model.nbytes()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    folder = write_model(tmp_path_factory.mktemp("target"))
    return load_causal_model(folder, precision="fp32", device=CPU)


def _load(folder: Path, target: CausalModel) -> Drafter:
    assert target.folder is not None
    return load_drafter(LoadContext(folder, target.folder, target, "fp32", CPU))


def _spec(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "draft.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


class _Fixed:
    """Always proposes the same tokens; remembers what it was told."""

    kind = "fixed"

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.begun, self.told = torch.tensor(tokens), 0, list[int]()

    def begin(self, prompt: torch.Tensor) -> None:
        self.begun += 1

    def propose(self, context: torch.Tensor, **_: object) -> Proposal:
        return Proposal(self.tokens)

    def rollback(self, num_accepted: int) -> None:
        self.told.append(num_accepted)

    def nbytes(self) -> int:
        return 7


def _mixed(draft: Drafter, context: list[int]) -> MixedDrafter:
    drafter = mixed_drafter(LookupDrafter(LookupSettings(longest=2, shortest=1)), draft)
    drafter.begin(torch.tensor(context))
    return drafter


def test_mixed_goes_by_who_is_right_more_often_in_this_request() -> None:
    draft, context = _Fixed(8, 8), [1, 2, 3, 1, 2]
    drafter = _mixed(draft, context)
    # Nothing is known of either: the draft goes first and is wrong, the match would have been right.
    assert _propose(drafter, context).tokens.tolist() == [8, 8]
    drafter.rollback(0)
    context = [*context, 3]
    # 2/3 against the draft's 1/3.
    assert _propose(drafter, context).tokens.tolist() == [1, 2, 3]
    drafter.rollback(3)
    assert draft.told == [0]
    context = [*context, 1, 2, 3, 9]
    # Nothing matches, and the draft is right.
    assert _propose(drafter, context).tokens.tolist() == [8, 8]
    drafter.rollback(2)
    context = [*context, 8, 8, 1]
    # A match of one token is untried: 1/2 against 3/5.
    assert _propose(drafter, context).tokens.tolist() == [8, 8]
    assert draft.told == [0, 2]
    # The next request begins anew.
    drafter.begin(torch.tensor(context))
    assert _propose(drafter, context).tokens.tolist() == [8, 8]
    assert draft.begun == 2


def test_mixed_counts_a_sibling_that_stands_for_the_draft() -> None:
    draft, context = _Fixed(8, 8), [1, 2, 3, 1, 2]
    drafter = _mixed(draft, context)
    assert _propose(drafter, context).tokens.tolist() == [8, 8]
    # Nothing of the chain stands, but the round emitted two tokens: a sibling did. Both matches are wrong.
    drafter.rollback(0)
    context = [*context, 9, 2]
    assert _propose(drafter, context).tokens.tolist() == [8, 8]
    drafter.rollback(0)
    # (1 + 1) / (3 + 2) against 1/3 of a match of two tokens, wrong the one time; uncounted it would be 1/4.
    context = [*context, 3]
    assert _propose(drafter, context).tokens.tolist() == [8, 8]


def test_mixed_takes_the_draft_where_nothing_matches() -> None:
    draft = _Fixed(8, 8)
    assert _propose(_mixed(draft, [1, 2, 3, 4]), [1, 2, 3, 4]).tokens.tolist() == [8, 8]


def test_mixed_may_keep_the_drafts_own_blocks_short() -> None:
    class Limited(_Fixed):
        def propose(self, context: torch.Tensor, **options: object) -> Proposal:
            return Proposal(self.tokens[: options["limit"]])  # type: ignore[misc]

    lookup = LookupDrafter(LookupSettings(longest=2, shortest=1))
    drafter = mixed_drafter(lookup, Limited(8, 8, 8), draft_tokens=2)
    context = [1, 2, 3, 1, 2]
    drafter.begin(torch.tensor(context))
    assert _propose(drafter, context).tokens.tolist() == [8, 8]
    drafter.rollback(0)
    # The match was right, the draft was not.
    assert _propose(drafter, [*context, 3]).tokens.tolist() == [1, 2, 3]
    drafter.begin(torch.tensor([1, 2, 3, 4]))
    assert _propose(drafter, [1, 2, 3, 4], limit=1).tokens.tolist() == [8]


def test_mixed_reads_features_only_where_its_draft_does() -> None:
    class Reader(_Fixed):
        taps = (1, 3)

        def read(self, features: torch.Tensor) -> None:
            self.told.append(int(features[0, 0]))

    plain, reader = _mixed(_Fixed(8), [1, 2]), _mixed(Reader(8), [1, 2])
    assert not isinstance(plain, ReadsFeatures) and plain.nbytes() == 7
    assert isinstance(reader, ReadsFeatures) and reader.taps == (1, 3)
    reader.read(torch.full((2, 4), 5.0))
    assert isinstance(reader.draft, Reader) and reader.draft.told == [5]


def test_mixed_folders_hold_the_other_draft(tmp_path: Path, target: CausalModel) -> None:
    folder = _spec(tmp_path / "mixed", {"kind": "mixed", "longest": 5, "shortest": 3})
    _spec(write_model(folder / "draft", layers=1), {"kind": "model"})
    drafter = _load(folder, target)
    assert isinstance(drafter, MixedDrafter) and isinstance(drafter.draft, ModelDrafter)
    assert drafter.lookup.settings == LookupSettings(longest=5, shortest=3)


def test_folders_load_as_the_kind_they_name(tmp_path: Path, target: CausalModel) -> None:
    assert isinstance(_load(_spec(tmp_path / "none", {"kind": "none"}), target), NoDrafter)
    lookup = _load(_spec(tmp_path / "lookup", {"kind": "lookup", "longest": 5, "shortest": 2}), target)
    assert isinstance(lookup, LookupDrafter)
    assert lookup.settings == LookupSettings(longest=5, shortest=2)
    model = _load(_spec(write_model(tmp_path / "model", layers=1), {"kind": "model"}), target)
    assert isinstance(model, ModelDrafter)


@pytest.mark.parametrize(("weight_format", "kept"), [("nf4", None), ("int8", [0, 2])])
def test_quantized_folders_need_no_weights(
    tmp_path: Path, target: CausalModel, weight_format: str, kept: list[int] | None
) -> None:
    spec = {"kind": "quantized", "format": weight_format, "kept_layers": kept}
    drafter = _load(_spec(tmp_path / "draft", spec), target)
    assert isinstance(drafter, ModelDrafter) and drafter.kind == "quantized"
    assert drafter.model.model.config.num_hidden_layers == (len(kept) if kept else 3)
    assert drafter.nbytes() < target.nbytes()
    drafter.begin(torch.tensor([1, 2, 3]))
    assert len(_propose(drafter, [1, 2, 3])) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "draft.json is not JSON"),
        ([1], "draft.json names no kind"),
        ({"longest": 3}, "draft.json names no kind"),
        ({"kind": 3}, "draft.json names no kind"),
        ({"kind": "wizard"}, "unknown kind 'wizard' .*: choose one of feature, lookup, mixed, model, none, quantized"),
        ({"kind": "../model"}, "unknown kind"),
        ({"kind": "__init__"}, "unknown kind"),
        ({"kind": "lookup"}, "look-up settings are off: 'longest'"),
        ({"kind": "lookup", "longest": 1, "shortest": 2}, "look-up settings are off: need 1 <= shortest"),
        ({"kind": "mixed", "longest": 1, "shortest": 2}, "look-up settings are off"),
        ({"kind": "mixed", "longest": 3, "shortest": 2}, "no draft here"),
        ({"kind": "mixed", "longest": 3, "shortest": 2, "draft_tokens": "two"}, "draft_tokens is 'two'"),
        ({"kind": "quantized", "format": "nf3"}, "unknown format 'nf3'; choose one of nf4, int8"),
        ({"kind": "quantized", "format": "nf4", "kept_layers": 3}, "quantized draft"),
        ({"kind": "quantized", "format": "nf4", "kept_layers": [0, 9]}, "cannot keep layer 9 of 3"),
        ({"kind": "model"}, "no config.json here"),
    ],
)
def test_malformed_draft_folders_are_refused_in_one_line(
    tmp_path: Path, target: CausalModel, content: object, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _load(_spec(tmp_path / "draft", content), target)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_draft_is_refused(tmp_path: Path, target: CausalModel) -> None:
    with pytest.raises(InputError, match=r"no draft here .*draft.json.*: point at a folder that holds draft.json"):
        _load(tmp_path, target)


def test_a_draft_with_another_vocabulary_size_is_refused(tmp_path: Path, target: CausalModel) -> None:
    folder = write_model(tmp_path / "draft", vocabulary=tokenizer(extra=["<one more>"]))
    with pytest.raises(InputError, match=f"the draft has {target.vocab_size + 1} tokens, the target"):
        _load(_spec(folder, {"kind": "model"}), target)


def test_a_draft_with_another_tokenizer_is_refused(tmp_path: Path, target: CausalModel) -> None:
    assert target.folder is not None
    folder = tmp_path / "draft"
    shutil.copytree(target.folder, folder)
    file = folder / "tokenizer.json"
    # Two letters trade their ids: the same size, another meaning.
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"the draft's tokenizer differs, for example at '[ab]'"):
        _load(_spec(folder, {"kind": "model"}), target)
