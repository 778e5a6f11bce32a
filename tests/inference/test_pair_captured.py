"""A pair answers by captured rounds: the ordinary decoder's greedy tokens, streamed, of any length, and what is left to
that decoder or refused.

Without a GPU the same rounds run uncaptured.
"""

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.decoder import decode
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.feature_networks._checkpoint import save_network
from inference.graphed import growing, programs
from inference.graphed.growing import GrowingDecoder
from inference.loading import load_causal_model
from inference.lookahead.confidence import ConfidenceLookahead
from inference.lookahead.fixed import FixedLookahead
from inference.pair import Generated, Pair, load_pair
from inference.parallel import ParallelModel
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.target import target_digest
from inference.traffic import TrafficLog, read_traffic
from inference.trees import Tree
from tests.inference.test_feature_drafts import CONFIGS, network_for
from tests.pipelines.tiny import CONTEXT, write_model

BLOCK = 3
FIXED: dict[str, Any] = {"kind": "fixed", "tokens": BLOCK}
QUESTION = "Why is the sky blue?"
KINDS = ("none", "eagle3", "dspark")


def made(root: Path) -> Path:
    """A folder with a target, and drafts of it that read its features."""
    model = load_causal_model(write_model(root / "target", layers=2), precision="fp32", device=torch.device("cpu"))
    for kind in ("eagle3", "dspark"):
        save_network(network_for(CONFIGS[kind], model), root / kind)
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("captured"))


@pytest.fixture
def load(folders: Path, tmp_path: Path) -> Callable[..., Pair]:
    """Load a pair with a draft of some kind, decoding by captured rounds."""

    def loaded(kind: str, *, lookahead: dict[str, Any] = FIXED, **options: Any) -> Pair:
        return load_pair(written(folders, tmp_path, kind, lookahead), **{"captured": "on", "device": "cpu", **options})

    return loaded


def written(folders: Path, tmp_path: Path, kind: str, lookahead: dict[str, Any] = FIXED) -> Path:
    """The folder of a pair."""
    folder = tmp_path / "pair"
    (folder / "draft").mkdir(parents=True, exist_ok=True)
    draft: dict[str, object] = {"kind": kind}
    if kind == "lookup":
        draft |= {"longest": 3, "shortest": 1}
    if (folders / kind).is_dir():
        draft = {"kind": "feature"}
        for file in (folders / kind).iterdir():
            (folder / "draft" / file.name).write_bytes(file.read_bytes())
    (folder / "draft" / "draft.json").write_text(json.dumps(draft), encoding="utf-8")
    target = folders / "target"
    reference = {"path": str(target), "revision": "", "digest": target_digest(target), "attention": "sdpa"}
    info = {
        "schema_version": 1,
        "target": reference,
        "draft": {"name": kind, "kind": draft["kind"]},
        "decoding": {"precision": "fp32", "lookahead": lookahead},
    }
    (folder / "pair.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that the ordinary decoder will be asked for."""
    asked: list[Request] = []

    def decoding(*given: Any, **named: Any) -> Decoded:
        asked.append(named["request"])
        return decode(*given, **named)

    monkeypatch.setattr("inference.pair.decode", decoding)
    return asked


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    return watched(monkeypatch)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that `auto` takes for a GPU."""
    monkeypatch.setattr(growing, "_on_gpu", lambda target: True)


def uncaptured(pair: Pair) -> Pair:
    return dataclasses.replace(pair, captured="off")


def rounds_of(pair: Pair) -> GrowingDecoder:
    assert pair._rounds is not None
    return pair._rounds


# Answers


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_and_passes_are_the_ordinary_decoders(
    load: Callable[..., Pair], ordinary: list[Request], kind: str
) -> None:
    pair = load(kind)
    for prompt, tokens in ((QUESTION, 40), ("x", 1), ("a longer question " * 6, 500)):
        given = pair.generate(prompt, max_new_tokens=tokens)
        assert not ordinary
        wanted = uncaptured(pair).generate(prompt, max_new_tokens=tokens)
        assert given.text == wanted.text and given.decoded.tokens == wanted.decoded.tokens
        assert given.decoded.passes == wanted.decoded.passes
        ordinary.clear()


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_blocks_are_the_policys_as_far_as_the_draft_goes(load: Callable[..., Pair], tokens: int) -> None:
    pair = load("eagle3", lookahead={"kind": "fixed", "tokens": tokens})
    assert set(pair.generate(QUESTION, max_new_tokens=20).decoded.blocks) == {tokens}
    longer = dataclasses.replace(pair, lookahead=FixedLookahead(BLOCK + 5))
    assert set(longer.generate(QUESTION, max_new_tokens=20).decoded.blocks) == {BLOCK}


@pytest.mark.parametrize("kind", ["eagle3", "lookup"])
def test_a_block_of_nothing_is_target_only_decoding(
    load: Callable[..., Pair], ordinary: list[Request], kind: str
) -> None:
    pair = load(kind, lookahead={"kind": "fixed", "tokens": 0})
    decoded = pair.generate(QUESTION, max_new_tokens=12).decoded
    assert decoded.passes == len(decoded.tokens) and not ordinary
    assert decoded.tokens == uncaptured(pair).generate(QUESTION, max_new_tokens=12).decoded.tokens


def test_an_answer_ends_at_its_budget_and_at_stop_tokens(
    load: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = load("eagle3")
    whole = pair.generate(QUESTION, max_new_tokens=30).decoded.tokens
    for budget in (1, 2, 7):
        assert pair.generate(QUESTION, max_new_tokens=budget).decoded.tokens == whole[:budget]
    stop = next(token for token in whole if token != whole[0])
    monkeypatch.setattr("inference.pair.stop_tokens", lambda target: frozenset({stop}))
    assert pair.generate(QUESTION, max_new_tokens=30).decoded.tokens == whole[: whole.index(stop) + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["none", "eagle3"])
def test_streamed_pieces_make_up_the_text(load: Callable[..., Pair], kind: str, temperature: float) -> None:
    pieces: list[str] = []
    pair = load(kind)
    for seed in (0, 1):
        pieces.clear()
        answer = pair.generate("hello", temperature=temperature, seed=seed, max_new_tokens=40, on_text=pieces.append)
        assert "".join(pieces) == answer.text
        assert all(pieces) and len(pieces) > 1


def test_a_seed_fixes_a_sampled_answer_whatever_came_before(load: Callable[..., Pair]) -> None:
    pair = load("eagle3")

    def answer(seed: int) -> Generated:
        return pair.generate(QUESTION, temperature=1.0, max_new_tokens=20, seed=seed)

    first = answer(3)
    assert answer(4).text != first.text
    pair.generate("something else, and longer", max_new_tokens=40)
    again = answer(3)
    assert again.decoded.tokens == first.decoded.tokens and again.decoded.passes == first.decoded.passes


def test_requests_do_not_remember_earlier_ones(load: Callable[..., Pair], ordinary: list[Request]) -> None:
    pair = load("dspark", captured="auto")
    alone = [pair.generate(prompt, max_new_tokens=24).text for prompt in (QUESTION, "hi")]
    pair = load("dspark")

    def broken(piece: str) -> None:
        raise RuntimeError("the reader is gone")

    for _ in range(2):
        assert pair.generate("hi", max_new_tokens=24).text == alone[1]
        assert pair.generate(QUESTION, max_new_tokens=24).text == alone[0]
        pair.generate("hi", temperature=1.0, max_new_tokens=24)
        with pytest.raises(RuntimeError, match="the reader is gone"):
            pair.generate("why", max_new_tokens=24, on_text=broken)


def test_figures_are_complete_and_seconds_told_apart_by_replays(load: Callable[..., Pair], tmp_path: Path) -> None:
    pair, log = load("eagle3"), TrafficLog(tmp_path / "traffic")
    for temperature in (0.0, 1.0):
        decoded = pair.generate(
            QUESTION, temperature=temperature, max_new_tokens=20, traffic=log, domain="chat"
        ).decoded
        assert all(decoded.seconds[part] > 0.0 for part in ("prefill", "draft", "verify"))
        assert decoded.seconds["accept"] == decoded.seconds["cache"] == 0.0
        assert decoded.cache_nbytes > 0 and decoded.blocks == {BLOCK: decoded.passes}
        record = read_traffic(tmp_path / "traffic").records[-1]
        assert (record.arm, record.domain, record.temperature) == ("eagle3", "chat", temperature)
        assert (record.emitted, record.passes) == (len(decoded.tokens), decoded.passes)
        assert record.proposed == decoded.proposed and record.accepted == decoded.accepted
        assert record.seconds == pytest.approx(decoded.total_seconds, abs=1e-5)


# Room


def test_buffers_are_made_at_first_use_and_grow_by_powers_of_two(load: Callable[..., Pair]) -> None:
    pair = load("eagle3")
    rounds = rounds_of(pair)
    assert rounds.room == 0
    prompt = int(pair.prompt_tokens("hi").shape[0])
    rooms = []
    for total in (60, 64, 30, 125, 126, 190, 40):
        wanted = uncaptured(pair).generate("hi", max_new_tokens=total - prompt).decoded.tokens
        assert pair.generate("hi", max_new_tokens=total - prompt).decoded.tokens == wanted
        rooms.append(rounds.room)
    # A block has room besides, in whole steps of 64 positions.
    assert rooms == [125, 125, 125, 125, 189, 317, 317]
    assert pair.generate("hi", max_new_tokens=10_000).decoded.tokens
    assert rounds.room >= CONTEXT and rounds.room < CONTEXT + 64
    assert len(rounds._timed) == 1, "rounds are timed once, not for every length of the buffers"


def test_the_old_buffers_are_gone_before_larger_ones_are_made(
    load: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = load("eagle3")
    pair.generate("hi", max_new_tokens=8)
    decoder = rounds_of(pair)._decoder
    assert decoder is not None
    old = weakref.ref(decoder.rounds.target)
    del decoder
    gone: list[bool] = []
    make = growing.captured_decoder

    def making(*given: Any, **named: Any) -> Any:
        gone.append(old() is None)
        return make(*given, **named)

    monkeypatch.setattr(growing, "captured_decoder", making)
    gc.disable()
    try:
        pair.generate("hi", max_new_tokens=150)
    finally:
        gc.enable()
    assert gone == [True]


def test_a_request_for_which_the_device_has_no_room_is_the_ordinary_decoders(
    load: Callable[..., Pair], ordinary: list[Request], on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = growing.captured_decoder
    tried: list[int] = []

    def making(*given: Any, **named: Any) -> Any:
        tried.append(named["tokens"])
        if named["tokens"] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(*given, **named)

    monkeypatch.setattr(growing, "captured_decoder", making)
    pair = load("eagle3", captured="auto", lookahead={"kind": "fixed", "tokens": 1})
    for tokens in (200, 20, 200, 20):
        pair.generate("hi", max_new_tokens=tokens)
    assert [request.max_new_tokens for request in ordinary] == [200, 200] and tried == [256, 64]
    strict = dataclasses.replace(pair, captured="on")
    with pytest.raises(InputError, match=r"no room for captured rounds of 256 tokens \[captured\]: use auto or off"):
        strict.generate("hi", max_new_tokens=200)


# Trees

BUSHY = Tree.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])
COPYING = Tree(BUSHY.paths, lookup=5)
TREE: dict[str, Any] = {**FIXED, "tree": BUSHY.to_json()}
SAMPLED: dict[str, Any] = {**FIXED, "tree": COPYING.to_json(), "tree_when_sampled": True}


def of_paths(*paths: list[int]) -> dict[str, Any]:
    """A tree in a file, or what is none."""
    return {**FIXED, "tree": {"paths": list(paths), "lookup": 0}}


@pytest.mark.parametrize(("kind", "tree"), [("eagle3", BUSHY), ("dspark", BUSHY), ("eagle3", COPYING)])
def test_greedy_answers_by_a_tree_are_the_targets_own(
    load: Callable[..., Pair], ordinary: list[Request], kind: str, tree: Tree
) -> None:
    pair = load(kind, lookahead={**FIXED, "tree": tree.to_json()})
    alone = dataclasses.replace(pair, lookahead=FixedLookahead(0), captured="off")
    for prompt, tokens in ((QUESTION, 40), ("x", 1), ("a longer question " * 6, 500)):
        given = pair.generate(prompt, max_new_tokens=tokens).decoded
        assert not ordinary and set(given.blocks) == {tree.size}
        assert given.tokens == alone.generate(prompt, max_new_tokens=tokens).decoded.tokens
        ordinary.clear()
    decoder = rounds_of(pair)._decoder
    assert decoder is not None and {name[0] for name in decoder.rounds.programs.names} == {"prompt", "tree"}


def test_sampled_answers_and_the_ordinary_decoders_go_by_the_chain(load: Callable[..., Pair]) -> None:
    pair, chain = load("eagle3", lookahead=TREE), load("eagle3")
    asked: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 20, "seed": 3}
    given = pair.generate(QUESTION, **asked).decoded
    assert set(given.blocks) == {BLOCK} and given.tokens == chain.generate(QUESTION, **asked).decoded.tokens
    plain = uncaptured(pair).generate(QUESTION, max_new_tokens=20).decoded
    assert max(plain.blocks) == BLOCK
    assert plain.blocks == uncaptured(chain).generate(QUESTION, max_new_tokens=20).decoded.blocks


def drawn_by_trees(pair: Pair, *, temperature: float, seed: int) -> Decoded:
    """A sampled answer by rounds of a tree, each token of which is what the target draws by the noise of the seed."""
    answer, target, pieces = pair.prompt_tokens(QUESTION), pair.target, list[list[int]]()
    request = Request(settings=SamplingSettings(temperature=temperature), max_new_tokens=40)
    decoded = rounds_of(pair).decode(answer, request=request, seed=seed, on_tokens=pieces.append)
    assert decoded is not None and decoded.blocks == {COPYING.size: len(pieces)}
    assert max(map(len, pieces)) > 1, "some of what was proposed stood"
    generator = torch.Generator(target.device).manual_seed(seed)
    noise = torch.empty(1, 1 + COPYING.depth, target.vocab_size, dtype=torch.float64, device=target.device)
    for piece in pieces:
        noise.exponential_(generator=generator)
        for depth, token in enumerate(piece):
            row = target.logits(answer, target.new_cache(), num_rows=1)[0].double() / temperature
            assert token == int((torch.log_softmax(row, -1) - noise[0, depth].log()).argmax())
            answer = torch.cat([answer, answer.new_tensor([token])])
    assert answer[-len(decoded.tokens) :].tolist() == decoded.tokens
    return decoded


@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampled_answers_by_a_tree_are_the_targets_draws_by_the_noise_of_the_seed(
    load: Callable[..., Pair], ordinary: list[Request], kind: str, temperature: float
) -> None:
    pair, seed = load(kind, lookahead=SAMPLED), 5
    decoded = drawn_by_trees(pair, temperature=temperature, seed=seed)
    # What the pair answers is that, and sampled rounds are timed by what they propose.
    asked: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 40, "seed": seed}
    given = pair.generate(QUESTION, **asked).decoded
    assert given.tokens[: len(decoded.tokens)] == decoded.tokens[: len(given.tokens)] and not ordinary
    assert set(rounds_of(pair)._timed) == {(COPYING, True)}
    # Greedy answers are the target's own, and the ordinary decoder's by the chain.
    alone = dataclasses.replace(pair, lookahead=FixedLookahead(0), captured="off")
    greedy = pair.generate(QUESTION, max_new_tokens=20).decoded
    assert greedy.tokens == alone.generate(QUESTION, max_new_tokens=20).decoded.tokens
    assert set(greedy.blocks) == {COPYING.size}
    assert max(uncaptured(pair).generate(QUESTION, **asked).decoded.blocks) == BLOCK


def test_buffers_have_room_for_a_tree(load: Callable[..., Pair]) -> None:
    wide = Tree.of([(rank,) for rank in range(7)] + [(rank, 0) for rank in range(7)])
    pair = load("eagle3", lookahead={"kind": "fixed", "tokens": 1, "tree": wide.to_json()})
    rounds, prompt = rounds_of(pair), int(pair.prompt_tokens("hi").shape[0])
    alone = dataclasses.replace(pair, lookahead=FixedLookahead(0), captured="off")
    rooms = []
    for total in (64, 65, 128, CONTEXT + 100):
        given = pair.generate("hi", max_new_tokens=total - prompt).decoded
        assert given.tokens == alone.generate("hi", max_new_tokens=total - prompt).decoded.tokens
        rooms.append(rounds.room)
    # As many tokens as a power of two, the 14 of a round, up to whole steps of 64 positions: 128, 192 and 384.
    assert rooms == [114, 114, 178, 370]
    assert [tree for tree, _ in rounds._timed] == [wide], "rounds are timed once, as greedy requests take them"


@pytest.mark.parametrize(("lookahead", "sizes"), [(TREE, [BUSHY.size, 0]), (SAMPLED, [COPYING.size] * 2)])
def test_a_record_of_traffic_says_that_rounds_were_of_a_tree(
    load: Callable[..., Pair], tmp_path: Path, lookahead: dict[str, Any], sizes: list[int]
) -> None:
    pair, log = load("eagle3", lookahead=lookahead), TrafficLog(tmp_path / "traffic")
    for temperature in (0.0, 1.0):
        pair.generate(QUESTION, temperature=temperature, max_new_tokens=20, traffic=log)
    assert [record.tree for record in read_traffic(tmp_path / "traffic").records] == sizes


@pytest.mark.parametrize(
    ("kind", "lookahead", "reason"),
    [
        ("eagle3", of_paths(), "the tree is off: a tree has nodes"),
        ("eagle3", of_paths([0, 0]), "the tree is off: a path of a tree lacks a beginning"),
        ("eagle3", {**FIXED, "tree": 3}, "the tree is off: it has paths and a lookup"),
        ("eagle3", {**FIXED, "tree": [[0]]}, "the tree is off: it has paths and a lookup"),
        ("eagle3", {**FIXED, "tree": Tree.chain(99).to_json()}, "the tree is off: a tree of 99 levels"),
        ("dspark", of_paths([9999]), "the tree is off: .* up to 10000 tokens after one"),
        ("lookup", TREE, "the tree is off: this draft proposes no trees"),
        ("eagle3", {"kind": "confidence", "tokens": 2, "threshold": 0.3, "tree": 1}, "confidence has no tree"),
        ("eagle3", {**FIXED, "tree_when_sampled": True}, "tree_when_sampled needs a tree"),
        ("eagle3", {**TREE, "tree_when_sampled": 1}, "tree_when_sampled is 1, which is neither true nor false"),
    ],
)
@pytest.mark.parametrize("captured", ["on", "off"])
def test_a_tree_that_cannot_be_proposed_is_one_line(
    load: Callable[..., Pair], kind: str, lookahead: dict[str, Any], reason: str, captured: str
) -> None:
    with pytest.raises(InputError, match=rf"{reason}.* \[pair.json\]: publish the pair again") as caught:
        load(kind, lookahead=lookahead, captured=captured)
    assert "\n" not in str(caught.value)


# What is left to the ordinary decoder, and refused


def test_a_cpu_goes_kernel_by_kernel_unless_asked(load: Callable[..., Pair], ordinary: list[Request]) -> None:
    for captured in ("auto", "off"):
        load("eagle3", captured=captured).generate("hi", max_new_tokens=4)
    assert len(ordinary) == 2


SETTINGS: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.9}, {"repetition_penalty": 1.2}]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: next(iter(setting)))
def test_other_sampling_settings_are_the_ordinary_decoders(
    load: Callable[..., Pair], ordinary: list[Request], on_gpu: None, setting: dict[str, Any]
) -> None:
    pair = load("eagle3", captured="auto")
    asked: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12, "seed": 2, **setting}
    assert pair.generate(QUESTION, **asked).text == uncaptured(pair).generate(QUESTION, **asked).text
    assert len(ordinary) == 2
    pair.generate(QUESTION, temperature=1.0, max_new_tokens=12)
    assert len(ordinary) == 2
    strict = dataclasses.replace(pair, captured="on")
    with pytest.raises(InputError, match=r"captured rounds know temperatures alone \[captured\]: use auto or off"):
        strict.generate(QUESTION, **asked)


CONFIDENT = {"kind": "confidence", "tokens": BLOCK, "threshold": 0.3}
SIBLINGS = {"kind": "fixed", "tokens": BLOCK, "siblings": [1]}


@pytest.mark.parametrize(
    ("kind", "lookahead", "reason"),
    [
        ("lookup", FIXED, "rounds of this draft cannot be captured"),
        ("eagle3", CONFIDENT, "captured rounds propose a fixed number of tokens, without siblings"),
        ("eagle3", SIBLINGS, "captured rounds propose a fixed number of tokens, without siblings"),
    ],
)
def test_other_drafts_and_policies_are_the_ordinary_decoders_and_refused_with_on(
    load: Callable[..., Pair],
    ordinary: list[Request],
    on_gpu: None,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    lookahead: dict[str, Any],
    reason: str,
) -> None:
    with caplog.at_level("INFO", logger="inference.graphed.growing"):
        pair = load(kind, lookahead=lookahead, captured="auto")
    assert [record.getMessage() for record in caplog.records] == [f"no captured rounds: {reason}"]
    assert pair.generate(QUESTION, max_new_tokens=12).decoded.tokens and len(ordinary) == 1
    with pytest.raises(InputError, match=rf"{reason} \[captured\]: use auto or off") as caught:
        load(kind, lookahead=lookahead)
    assert "\n" not in str(caught.value)


def test_layers_of_another_make_are_the_ordinary_decoders_and_refused_with_on(
    load: Callable[..., Pair], ordinary: list[Request], on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.graphed.target.lean_layers", lambda model: None)
    assert load("none", captured="auto").generate("hi", max_new_tokens=4).decoded.tokens and len(ordinary) == 1
    with pytest.raises(InputError, match=r"this target's layers cannot be captured \[captured\]: use auto or off"):
        load("none")


def test_a_window_that_a_request_outgrows_is_the_ordinary_decoders(
    load: Callable[..., Pair], ordinary: list[Request], on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = load("none", captured="auto")
    config = pair.target.model.config
    monkeypatch.setattr(config, "layer_types", ["sliding_attention", "full_attention"], raising=False)
    monkeypatch.setattr(config, "sliding_window", 100, raising=False)
    for tokens in (20, 120, 20):
        pair.generate("hi", max_new_tokens=tokens)
    assert [request.max_new_tokens for request in ordinary] == [120]
    strict = dataclasses.replace(pair, captured="on")
    with pytest.raises(InputError, match=r"layers see 100 of 256 positions, .* \[captured\]: use auto or off"):
        strict.generate("hi", max_new_tokens=120)


def test_a_spread_target_is_never_captured(load: Callable[..., Pair]) -> None:
    pair = load("none")
    spread = ParallelModel.__new__(ParallelModel)
    spread.__dict__ = dict(vars(pair.target))
    with pytest.raises(InputError, match="the target is spread over several processes"):
        Pair(pair.info, spread, NoDrafter(), FixedLookahead(0), pair.target_digest, "on")


def test_another_policy_in_its_place_is_followed(
    load: Callable[..., Pair], ordinary: list[Request], on_gpu: None
) -> None:
    """As docs/gpu.md does with what was published."""
    pair = load("eagle3", captured="auto")
    other = dataclasses.replace(pair, lookahead=ConfidenceLookahead(BLOCK, threshold=0.3))
    assert other.generate("hi", max_new_tokens=8).text == pair.generate("hi", max_new_tokens=8).text
    assert len(ordinary) == 1


def test_a_prompt_longer_than_the_context_is_refused_in_the_same_words(load: Callable[..., Pair]) -> None:
    pair = load("eagle3")
    with pytest.raises(InputError, match="the context holds 320"):
        pair.generate("x" * 400)
    assert rounds_of(pair).room == 0


def test_another_word_is_refused(load: Callable[..., Pair]) -> None:
    with pytest.raises(ValueError, match="captured is 'yes'; choose one of auto, on, off, compiled"):
        load("none", captured="yes")


# Compiled


def test_compiled_is_on_with_fused_kernels_and_rounds_that_are_not_told_apart(
    load: Callable[..., Pair], ordinary: list[Request]
) -> None:
    fused, plain = load("eagle3", captured="compiled", lookahead=TREE), load("eagle3", lookahead=TREE)
    given, wanted = (pair.generate(QUESTION, max_new_tokens=40) for pair in (fused, plain))
    assert given.decoded.tokens == wanted.decoded.tokens and not ordinary
    asked = [pair._rounds._decoder.rounds.programs._compiled for pair in (fused, plain)]  # type: ignore[union-attr]
    assert asked == [True, False]
    # Timing the parts would compile each of them.
    assert given.decoded.seconds["draft"] == 0.0 < wanted.decoded.seconds["draft"]
    with pytest.raises(InputError, match="captured rounds"):
        fused.generate(QUESTION, temperature=1.0, top_k=3)


def test_kernels_that_cannot_be_fused_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise torch._dynamo.exc.TorchDynamoException("\nFailed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(torch, "compile", lambda work, *, dynamic: failing)
    with pytest.raises(InputError, match=r"cannot be fused here: Failed to find C compiler\. \[captured rounds, comp"):
        programs._fused(lambda: None)()
