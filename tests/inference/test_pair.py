"""A published pair is loaded from its files alone, answers as its target would, and is refused when it is not whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.device_profile import DeviceProfile, device_name, library_versions
from inference.drafters.lookup import LookupDrafter
from inference.drafters.model import ModelDrafter
from inference.errors import InputError
from inference.loading import load_causal_model
from inference.lookahead import Signals
from inference.lookahead.confidence import ConfidenceLookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookahead.scheduled import ScheduledLookahead
from inference.pair import Generated, Pair, _TextStream, load_lookahead, load_pair
from inference.pair_files import read_pair
from inference.target import stop_tokens, target_digest
from tests.inference.families import greedy_reference
from tests.pipelines.tiny import tokenizer, write_model

FIXED: dict[str, Any] = {"kind": "fixed", "tokens": 3}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("target"), layers=2)


@pytest.fixture
def write_pair(target: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a pair folder: `draft.json` and, for a model, its weights."""

    def write(draft: dict[str, object], *, lookahead: dict[str, Any] = FIXED, **changes: object) -> Path:
        folder = tmp_path / "pair"
        (folder / "draft").mkdir(parents=True)
        if draft["kind"] == "model":
            write_model(folder / "draft", layers=1, seed=1)
        (folder / "draft" / "draft.json").write_text(json.dumps(draft), encoding="utf-8")
        info: dict[str, object] = {
            "schema_version": 1,
            "target": {
                "path": str(target),
                "revision": "",
                "digest": target_digest(target),
                "attention": "sdpa",
            },
            "draft": {"kind": draft["kind"]},
            "decoding": {"precision": "fp32", "lookahead": lookahead},
        }
        (folder / "pair.json").write_text(json.dumps(info | changes), encoding="utf-8")
        return folder

    return write


LOOKUP = {"kind": "lookup", "longest": 3, "shortest": 1}


def _load(folder: Path, **options: Any) -> Pair:
    return load_pair(folder, device="cpu", cache=folder.parent / "cache", **options)


@pytest.mark.parametrize("draft", [{"kind": "none"}, LOOKUP, {"kind": "model"}, {"kind": "quantized", "format": "nf4"}])
def test_a_pair_answers_as_its_target_alone_would(
    write_pair: Callable[..., Path], target: Path, draft: dict[str, object]
) -> None:
    pair = _load(write_pair(draft))
    answer = pair.generate("Why is the sky blue?", max_new_tokens=24)
    model = load_causal_model(target, precision="fp32", device=torch.device("cpu"))
    expected = greedy_reference(model, pair.prompt_tokens("Why is the sky blue?"), 24)
    end = next((i + 1 for i, token in enumerate(expected) if token in stop_tokens(model)), 24)
    assert answer.decoded.tokens == expected[:end]
    assert answer.text == tokenizer().decode(expected[:end], skip_special_tokens=True)
    assert answer.tau == end / answer.decoded.passes
    assert answer.tokens_per_s == pytest.approx(end / answer.decoded.total_seconds)


def test_what_the_files_say_is_what_is_loaded(write_pair: Callable[..., Path], target: Path) -> None:
    pair = _load(write_pair(LOOKUP, lookahead={"kind": "confidence", "tokens": 5, "threshold": 0.3}))
    assert isinstance(pair.drafter, LookupDrafter)
    assert isinstance(pair.lookahead, ConfidenceLookahead)
    assert (pair.lookahead.max_tokens, pair.lookahead.threshold) == (5, 0.3)
    assert (pair.target.folder, pair.target.precision) == (target, "fp32")


def test_a_precision_that_is_not_on_offer_here_gives_way_to_an_exact_one(write_pair: Callable[..., Path]) -> None:
    folder = write_pair({"kind": "model"}, decoding={"precision": "fp16", "lookahead": FIXED})
    pair = _load(folder)
    assert pair.target.precision == "fp32"
    assert isinstance(pair.drafter, ModelDrafter) and pair.drafter.model.precision == "fp32"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_streamed_pieces_make_up_the_text(write_pair: Callable[..., Path], temperature: float, seed: int) -> None:
    # Random bytes: many characters are broken, which holds pieces back and may leave one at the end.
    pieces: list[str] = []
    answer = _load(write_pair(LOOKUP)).generate(
        "hello", temperature=temperature, seed=seed, max_new_tokens=40, on_text=pieces.append
    )
    assert "".join(pieces) == answer.text
    assert all(pieces) and len(pieces) > 1


def _streamed(target: Path, rounds: list[list[int]]) -> list[str]:
    pieces: list[str] = []
    model = load_causal_model(target, precision="fp32", device=torch.device("cpu"))
    stream = _TextStream(model, pieces.append)
    for tokens in rounds:
        stream.add(tokens)
    stream.finish()
    return pieces


def test_a_character_in_several_tokens_is_shown_when_it_is_complete(target: Path) -> None:
    ids = tokenizer()("a\u00e9b")["input_ids"]  # e with an accent is two bytes
    assert len(ids) == 4
    assert _streamed(target, [ids[:1], ids[1:2], ids[2:3], ids[3:]]) == ["a", "\u00e9", "b"]


def test_a_character_that_is_never_completed_is_shown_at_the_end(target: Path) -> None:
    ids = tokenizer()("a\u00e9")["input_ids"]
    assert _streamed(target, [ids[:2]]) == ["\ufffd"] or _streamed(target, [ids[:1], ids[1:2]]) == ["a", "\ufffd"]


def test_special_tokens_are_not_shown(target: Path) -> None:
    vocabulary = tokenizer()
    ids = vocabulary("ab")["input_ids"]
    assert _streamed(target, [ids, [vocabulary.eos_token_id]]) == ["ab"]


def test_the_same_seed_gives_the_same_answer(write_pair: Callable[..., Path]) -> None:
    pair = _load(write_pair({"kind": "model"}))

    def answer(seed: int) -> Generated:
        return pair.generate("hello", temperature=1.0, top_p=0.9, max_new_tokens=20, seed=seed)

    assert answer(3).text == answer(3).text
    assert answer(3).text != answer(4).text


def test_messages_go_through_the_chat_template(write_pair: Callable[..., Path]) -> None:
    pair = _load(write_pair({"kind": "none"}))
    one = pair.prompt_tokens("hi").tolist()
    assert tokenizer().decode(one) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert pair.prompt_tokens([{"role": "user", "content": "hi"}]).tolist() == one


def test_settings_out_of_range_are_refused(write_pair: Callable[..., Path]) -> None:
    pair = _load(write_pair({"kind": "none"}))
    with pytest.raises(ValueError, match="top_p is 2"):
        pair.generate("hi", top_p=2.0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        pair.generate("hi", max_new_tokens=0)


def test_a_prompt_longer_than_the_context_is_refused(write_pair: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="the context holds 320"):
        _load(write_pair({"kind": "none"})).generate("x" * 400)


def test_a_target_without_a_chat_template_is_refused(write_pair: Callable[..., Path], tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare", vocabulary=tokenizer(template=None))
    reference = {"path": str(bare), "revision": "", "digest": target_digest(bare), "attention": "sdpa"}
    pair = _load(write_pair({"kind": "none"}, target=reference))
    with pytest.raises(InputError, match="the target's tokenizer has no chat template"):
        pair.generate("hi")


def test_the_target_may_lie_elsewhere_but_must_be_the_same(
    write_pair: Callable[..., Path], target: Path, tmp_path: Path
) -> None:
    moved = {"path": "/made/elsewhere", "revision": "", "digest": target_digest(target), "attention": "sdpa"}
    folder = write_pair(LOOKUP, target=moved)
    assert _load(folder, target=str(target)).target.folder == target
    with pytest.raises(InputError, match="no such model folder"):
        _load(folder)
    other = write_model(tmp_path / "other", layers=2, seed=9)
    with pytest.raises(InputError, match=r"this target has digest .*, the pair was made for .*: use the target of the"):
        _load(folder, target=str(other))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no pair here .*: point at a registry version"),
        ("{", "pair.json is not JSON"),
        ("\xff", "pair.json is not JSON"),
        ("[]", "pair.json lacks keys of a pair"),
        ("{}", "pair.json lacks keys of a pair"),
        ('{"schema_version": 2}', "pair.json has schema 2, this code reads 1 .*: use a matching version"),
        ('{"schema_version": 1}', "pair.json lacks keys under 'target'"),
        ('{"schema_version": 1, "target": {"path": "x"}}', "pair.json lacks keys under 'target'"),
    ],
)
def test_a_folder_without_a_readable_pair_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "pair.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        read_pair(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_draft_of_an_unknown_kind_is_refused(write_pair: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"unknown kind 'os' .*: choose one of"):
        _load(write_pair({"kind": "os"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "oracle", "tokens": 3}, "unknown kind 'oracle'"),
        ({"kind": "fixed"}, "lookahead settings are off: 'tokens'"),
        ({"kind": "fixed", "tokens": 3, "colour": 1}, "lookahead settings are off: .*colour"),
        (
            {"kind": "confidence", "tokens": 3, "threshold": 7.0},
            "lookahead settings are off: lookahead.threshold is 7.0",
        ),
    ],
)
def test_policies_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_lookahead(settings)


MEASURED: dict[str, Any] = {
    "costs": {"passes": {"1": 1.0, "2": 1.1}, "block_seconds": 0.2, "token_seconds": 0.1},
    "conditional": [0.5],
    "chances": {"source": "confidence", "calibration": {"temperatures": [2.0]}, "curves": []},
}


def _scheduled(write_pair: Callable[..., Path], measured: object, cost_profile: dict[str, object]) -> Path:
    lookahead = {"kind": "scheduled", "tokens": 3}
    decoding = {"precision": "fp32", "lookahead": lookahead, "measured": measured}
    return write_pair(LOOKUP, decoding=decoding, cost_profile=cost_profile)


@pytest.fixture
def remeasured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts a pretended profile in place, twice as slow as the pair's; where it was asked for."""
    asked: list[Path] = []

    def pretend(target: object, cache: Path) -> DeviceProfile:
        asked.append(cache)
        passes = {"fp32": {1: 2.0, 2: 4.0}}
        return DeviceProfile("here", {}, passes, {}, {})

    monkeypatch.setattr("inference.pair.device_profile", pretend)
    return asked


def test_costs_are_those_of_the_score_where_it_was_measured(
    write_pair: Callable[..., Path], remeasured: list[Path]
) -> None:
    here = {"device": device_name(torch.device("cpu")), "versions": library_versions()}
    policy = _load(_scheduled(write_pair, MEASURED, here)).lookahead
    assert isinstance(policy, ScheduledLookahead) and not remeasured
    assert policy.measured.costs.seconds(1) == pytest.approx(1.1 + 0.3)
    assert policy.measured.conditional == (0.5,)
    assert policy.measured.chances.of([Signals(confidence=0.9)]) == pytest.approx([0.75])


@pytest.mark.parametrize("other", [{"device": "abacus"}, {"versions": {"torch": "0.1"}}, {}])
def test_costs_are_measured_anew_elsewhere(
    write_pair: Callable[..., Path], remeasured: list[Path], other: dict[str, object]
) -> None:
    here = {"device": device_name(torch.device("cpu")), "versions": library_versions()}
    policy = _load(_scheduled(write_pair, MEASURED, here | other if other else {})).lookahead
    assert isinstance(policy, ScheduledLookahead) and len(remeasured) == 1
    # Passes as measured here; drafting twice as slow, as a pass of one token is.
    assert policy.measured.costs.seconds(1) == pytest.approx(4.0 + 0.6)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (None, "lookahead=scheduled weighs tokens against seconds"),
        ({"costs": MEASURED["costs"]}, "the measurements are off: 'conditional'"),
        (MEASURED | {"conditional": [1.5]}, "a chance lies outside"),
        (MEASURED | {"costs": {"passes": {}}}, "the costs are off"),
        (MEASURED | {"costs": {"passes": {"1": "soon"}}}, "the costs are off"),
    ],
)
def test_a_policy_without_sound_measurements_is_refused(
    write_pair: Callable[..., Path], measured: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _load(_scheduled(write_pair, measured, {}))


def test_a_pair_under_an_adaptive_policy_answers_as_its_target_alone_would(write_pair: Callable[..., Path]) -> None:
    here = {"device": device_name(torch.device("cpu")), "versions": library_versions()}
    folder = _scheduled(write_pair, MEASURED, here)
    pair = _load(folder)
    tokens = pair.generate("Why is the sky blue?", max_new_tokens=24).decoded.tokens
    expected = greedy_reference(pair.target, pair.prompt_tokens("Why is the sky blue?"), 24)
    assert len(tokens) == 24 or tokens[-1] in stop_tokens(pair.target)
    assert tokens == expected[: len(tokens)]


def test_a_block_of_nothing_proposes_nothing_whatever_the_policy() -> None:
    for kind in ("fixed", "confidence"):
        policy = load_lookahead({"kind": kind, "tokens": 0})
        assert isinstance(policy, FixedLookahead) and policy.max_tokens == 0


def test_a_pair_of_an_earlier_version_may_name_settings_that_are_no_more() -> None:
    lookahead = load_lookahead({"kind": "fixed", "tokens": 3, "siblings": [], "trees": [16], "tree_depth": 8})
    assert isinstance(lookahead, FixedLookahead) and lookahead.longest == 3
    with pytest.raises(InputError, match="lookahead settings are off"):
        load_lookahead({"kind": "fixed", "tokens": 3, "siblings": [], "tree_width": 8})
