"""Drafts that read the target's features, through the stages: what the corpus keeps for them, how they are built with
it or without, what a kill or a full disk does to that, and the pair that comes out.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from distill.corpus import Sample, read_shards
from distill.features import FeatureShards, capture_features
from inference.decoder import decode
from inference.device_profile import WIDTHS, DeviceProfile
from inference.drafters import LoadContext, load_drafter
from inference.errors import InputError
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_drafts.medusa import Config as Medusa
from inference.feature_networks import make_network
from inference.feature_networks._checkpoint import go_on_from, save_network
from inference.feature_networks._layers import DraftShape
from inference.loading import load_causal_model
from inference.lookahead.fixed import FixedLookahead
from inference.pair import load_pair
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.target import stop_tokens
from pipelines import capturing, config, corpus_shards, finish, plan, publish, select, training, verify
from pipelines.artifacts import Artifact, Store
from pipelines.exports.write import read_exports
from pipelines.select import Decision, decide
from tests.pipelines.conftest import Finished
from tests.pipelines.forked import Runner, kill_group, wait_until_there
from tests.pipelines.tiny import Workplace, contents, read, records, run, token_digests
from train.memory import Took

KINDS = ("dspark", "dflash", "eagle3")
HIDDEN = 64  # of the tiny target
BYTES = 2  # of a bf16 number
ANSWER = 12  # corpus.max_new_tokens of a tiny workplace


def small(*kinds: str) -> list[str]:
    """Words that choose feature drafts beside the baseline, as small as the tiny target."""
    sizes = {"vocabulary": 64, "block": 3, "anchors": 4}
    own = [f"draft.{kind}.{name}={size}" for kind in kinds for name, size in sizes.items()]
    return [f"draft=[none,{','.join(kinds)}]", *own]


THREE = (
    *small(*KINDS),
    "corpus.taps=[0,1,2]",
    "draft.dspark.taps=[2,0]",
    "draft.eagle3.taps=[0,1,2]",
    "lookahead.tokens=3",
    "trainer.steps=8",
    "trainer.checkpoint_every_steps=100",
    "decode.max_new_tokens=10",
    "budget.score_prompts=1",
)
"""All three kinds: one reads some of the kept layers in an order of its own, one the default, one all of them."""

CORPUS = ("draft=[none]", "corpus.taps=[0,1,2]")
"""A corpus as that of `THREE`; drafts do not count."""

UNKEPT = "corpus.keep_features=false"
TAPS = {"dspark": [2, 0], "dflash": [1], "eagle3": [0, 1, 2]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def winning(name: str) -> Callable[..., Decision]:
    """A `decide` that is for one draft, however slow it is: which is fastest here is the machine's mood."""

    def decided(*given: Any, **settings: Any) -> Decision:
        return dataclasses.replace(decide(*given, **settings), winner=name, reason=f"{name} is to win")

    return decided


@pytest.fixture(scope="module")
def featured(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A workplace after one run of all stages with all three kinds, of which DSpark is published. Read only.

    What the run printed has a line `a file of features` where one was written.
    """
    place = tiny_place.again(tmp_path_factory.mktemp("featured"))
    write = corpus_shards.write_features

    def heard(*given: Any, **named: Any) -> None:
        sys.stderr.write("a file of features\n")
        write(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        patch.setattr(corpus_shards, "write_features", heard)
        patch.setattr(select, "decide", winning("dspark"))
        out, code = run(place.words(*THREE))
    return Finished(place, code, out)


class Captured(NamedTuple):
    """A workplace whose corpus kept no features, after its drafts were built; and what lay beside each as it trained.

    Attributes:
        place: where.
        out: what the build printed.
        beside: feature files there were when each training began, in the order of the drafts.
    """

    place: Workplace
    out: str
    beside: list[list[str]]


@pytest.fixture(scope="module")
def captured(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """The drafts of `featured`, built from a corpus without features. Read only."""
    place = tiny_place.again(tmp_path_factory.mktemp("captured"))
    beside: list[list[str]] = []
    fit = training.fit

    def seen(*given: Any, folder: Path, **settings: Any) -> Any:
        beside.append(sorted(p.name for p in (folder / "features").glob("*")))
        return fit(*given, folder=folder, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        patch.setattr(training, "fit", seen)
        assert run(place.words(*THREE, UNKEPT, stage="corpus"))[1] == 0
        out, code = run(place.words(*THREE, UNKEPT, stage="build"))
    assert code == 0, out
    return Captured(place, out, beside)


def alone(kind: str) -> list[str]:
    """The words of `THREE` with one of its drafts only, which ends as it does there."""
    own = f"draft.{kind}."
    return [f"draft=[none,{kind}]", *(w for w in THREE if w.startswith(own) or not w.startswith("draft"))]


def copied(place: Workplace, root: Path, *kinds: str) -> Workplace:
    """A workplace with another's target, prompts and artifacts of some kinds, to change."""
    copy = place.again(root)
    for kind in kinds:
        shutil.copytree(place.artifacts / kind, copy.artifacts / kind)
    return copy


def metrics(place: Workplace, name: str) -> dict[str, Any]:
    """What the build measured of a draft."""
    found: dict[str, Any] = read(place.draft(name) / "manifest.json")["metrics"]
    return found


def feature_files(folder: Path) -> list[str]:
    """Names of the feature files in a folder."""
    return sorted(p.name for p in folder.glob("*.features.safetensors"))


FIVE = [f"shard-0000{index}.features.safetensors" for index in range(5)]  # 18 conversations, 4 a shard


# Through all stages


def test_every_kind_goes_through_every_stage(featured: Finished) -> None:
    assert featured.code == 0, featured.out
    place = featured.place
    for kind in KINDS:
        artifact = Artifact.load(place.draft(kind))
        artifact.verify()
        folder = artifact.path / "draft"
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "draft.json", "model.safetensors"]
        assert read(folder / "draft.json") == {"kind": "feature"}
        described = read(folder / "config.json")
        assert (described["kind"], described["target_layer_ids"]) == (kind, TAPS[kind])
        assert (described["draft_vocab_size"], described["vocab_size"], described["block_size"]) == (64, 259, 3)
        assert artifact.metrics["steps"] == 8 and 0 < artifact.metrics["eval/acceptance"] < 1
        assert 0 < artifact.metrics["covered_mass"] < 1
    cards = read(place.only("score") / "scorecard.json")["scorecards"]
    assert {c["arm"] for c in cards if (c["domain"], c["temperature"]) == ("overall", None)} == {"none", *KINDS}
    assert all(f"| {kind} |" in (place.only("score") / "scorecard.md").read_text() for kind in KINDS)


def test_greedy_feature_drafts_write_what_the_target_writes(featured: Finished) -> None:
    folder = featured.place.only("score")
    wrote = {(prompt, arm): d for (prompt, temperature, arm), d in token_digests(folder).items() if temperature == 0}
    assert len(wrote) == 3 * 4
    assert all(digest == wrote[prompt, "none"] for (prompt, _), digest in wrote.items())
    assert all(r["mismatch"] is None for r in records(folder))
    assert all(c["mismatches"] == 0 for c in read(folder / "scorecard.json")["scorecards"])
    for kind in KINDS:
        mine = [r for r in records(folder) if r["arm"] == kind]
        proposed, accepted = (sum(sum(r[key]) for r in mine) for key in ("proposed", "accepted"))
        assert 0 < accepted < proposed, f"{kind} proposes, some of it stands, some does not"


# The pair


def greedy(folder: Path, prompt: torch.Tensor, *, count: int, stops: frozenset[int]) -> list[int]:
    """What a target writes alone, whole sequence after whole sequence."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokens = prompt.tolist()
    with torch.inference_mode():
        while len(tokens) < prompt.shape[0] + count and (len(tokens) == prompt.shape[0] or tokens[-1] not in stops):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[prompt.shape[0] :]


def test_a_feature_draft_is_published_after_a_fresh_process_repeated_its_tokens(featured: Finished) -> None:
    version = featured.place.champion
    pair = read(version / "pair.json")
    assert (pair["draft"]["name"], pair["draft"]["kind"]) == ("dspark", "dspark")
    assert set(pair["draft"]["files"]) == {"config.json", "draft.json", "model.safetensors"}
    checks = read(version / "checks.json")
    assert {(c["arm"], c["temperature"]) for c in checks} == {("dspark", 0.0), ("dspark", 1.0)}
    assert f"published {version.resolve()}: dspark is to win" in featured.out


def test_a_loaded_pair_writes_greedily_what_the_target_writes_alone(featured: Finished) -> None:
    assert_writes_as_the_target_alone(featured.place, "dspark")


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_so_does_a_pair_with_a_draft_of_another_kind(
    featured: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = copied(featured.place, tmp_path / "place", "plan", "corpus", "draft", "score", "select")
    decision = place.only("select") / "decision.json"
    decision.write_text(json.dumps(read(decision) | {"winner": kind}), encoding="utf-8")
    repeated: list[int] = []
    # A fresh process does this in `featured`; here the same files are read by this one.
    monkeypatch.setattr(
        publish,
        "_finish_in_fresh_process",
        lambda folder, context: (
            repeated.append(finish.finish(folder, exports=["all"], cache=place.cache)) or asdict(Took(0.0, 0, 0, False))
        ),
    )
    text, code = run(place.words(*THREE, stage="publish"))
    assert code == 0, text
    assert repeated == [2], "one prompt at both temperatures"
    layouts = {export.layout for export in read_exports(place.registry / "tiny" / "champion" / "serve")}
    assert layouts == {kind, f"{kind}_speculators"}
    assert_writes_as_the_target_alone(place, kind)


def test_a_draft_behind_look_up_is_made_after_the_other_and_published_whole(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tiny_place.again(tmp_path / "mixed")
    monkeypatch.setattr(select, "decide", winning("mixed"))
    words = [w.replace("draft=[none,eagle3]", "draft=[none,mixed,eagle3]") for w in small("eagle3")]
    more = ("corpus.taps=[0,1,2]", "lookahead.tokens=3", "decode.max_new_tokens=10", "budget.score_prompts=1")
    text, code = run(place.words(*words, *more))
    assert code == 0, text
    info = read(place.champion / "pair.json")
    assert {"draft.json", "draft/draft.json", "draft/model.safetensors"} <= info["draft"]["files"].keys()
    inner = {file.name: file.read_bytes() for file in (place.champion / "draft" / "draft").iterdir()}
    [made] = [a for a in place.complete("draft") if read(a / "draft" / "draft.json")["kind"] == "feature"]
    assert inner == {file.name: file.read_bytes() for file in (made / "draft").iterdir()}
    assert_writes_as_the_target_alone(place, "mixed", kind="mixed")
    (place.champion / "draft" / "draft" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="a file of the draft was changed or damaged"):
        verify.verify(place.champion, cache=place.cache)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["draft=[none,mixed]", "draft.mixed.of=eagle3"],
            "no draft 'eagle3' in the list [draft.mixed.of]: add it to the list, as in draft=[none,eagle3,mixed], "
            "or name one that is in it",
        ),
        (
            ["draft=[none,lookup,mixed]", "draft.mixed.of=mixed"],
            "'mixed' contains a draft itself [draft.mixed.of]: name one that contains none",
        ),
        (
            ["draft=[none,mixed]", "draft.mixed.of=[tuned,dspark]"],
            "no draft 'tuned' or 'dspark' in the list [draft.mixed.of]: add it to the list, as in "
            "draft=[none,tuned,mixed], or name one that is in it",
        ),
        (
            ["draft=[none,tuned]"],
            "no draft 'seed' in the list [draft.tuned.start_from]: add it to the list, as in draft=[none,seed,tuned], "
            "or name one that is in it",
        ),
        (
            ["draft=[none,tuned]", "draft.tuned.start_from=tuned"],
            "'tuned' needs itself [draft.tuned.start_from]: name a draft that does without it",
        ),
    ],
)
@pytest.mark.parametrize("stage", [None, "build"])
def test_a_draft_that_is_to_contain_one_that_is_not_there_is_refused(
    tiny_place: Workplace, tmp_path: Path, words: list[str], message: str, stage: str | None
) -> None:
    place = tiny_place.again(tmp_path / "place")
    text, code = run(place.words(*words, stage=stage))
    assert (code, text.splitlines()[-1]) == (2, f"dspark: {message}")
    assert not place.artifacts.exists(), "found out before anything is made"


def test_training_goes_on_from_a_draft_that_was_made_before(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny_place.again(tmp_path / "first")
    words = [*small("eagle3"), "corpus.taps=[0,1,2]", "decode.max_new_tokens=10", "budget.score_prompts=1"]
    text, code = run(first.words(*words, stage="corpus"))
    assert code == 0, text
    text, code = run(first.words(*words, stage="build"))
    assert code == 0, text
    [made] = [a for a in first.complete("draft") if read(a / "draft" / "draft.json")["kind"] == "feature"]
    place = tiny_place.again(tmp_path / "second")
    monkeypatch.setattr(select, "decide", winning("mixed"))
    words = ["draft=[none,mixed,tuned,seed]", "draft.tuned.anchors=4", f"draft.seed.path={made}"]
    more = ("corpus.taps=[0,1,2]", "lookahead.tokens=3", "decode.max_new_tokens=10", "budget.score_prompts=1")
    text, code = run(place.words(*words, *more))
    assert code == 0, text
    assert "left out" not in text
    before, trained = load_file(made / "draft" / "model.safetensors"), None
    for folder in place.complete("draft"):
        if read(folder / "manifest.json")["config"]["draft"].get("start_from") == "seed":
            trained = load_file(folder / "draft" / "model.safetensors")
            settings = read(folder / "draft" / "config.json")["settings"]
    assert trained is not None and trained.keys() == before.keys()
    assert settings["vocabulary"] == read(made / "draft" / "config.json")["settings"]["vocabulary"]
    assert (settings["anchors"], settings["lr"]) == (4, 0.0005), "how it is trained is said anew"
    assert torch.equal(trained["d2t"], before["d2t"]) and torch.equal(
        trained["lm_head.weight"], before["lm_head.weight"]
    )
    moved = [name for name, tensor in trained.items() if not torch.equal(tensor, before[name])]
    assert moved, "it was trained"
    far = max(float((trained[name].float() - before[name].float()).abs().max()) for name in moved)
    assert far < 0.05, "and started where the other had ended"
    assert_writes_as_the_target_alone(place, "mixed", kind="mixed")


@pytest.mark.parametrize("why", ["not there", "another shape", "other tokens"])
def test_an_optional_draft_that_is_no_candidate_is_left_out_with_what_starts_from_it(
    tiny_place: Workplace, tmp_path: Path, why: str
) -> None:
    place = tiny_place.again(tmp_path / "place")
    folder = tmp_path / "made"
    folder.mkdir()
    reasons = {
        "not there": "it is not there",
        "another shape": "it was made for a target of another shape",
        "other tokens": "it was made for a target with other tokens",
    }
    if why != "not there":
        (folder / "draft.json").write_text('{"kind": "feature"}', encoding="utf-8")
        shape = dataclasses.asdict(DraftShape.of(AutoConfig.from_pretrained(place.root / "target")))
        shape |= {"hidden": 8} if why == "another shape" else {}
        text = {"shape": shape, "vocabulary_sha256": "0" * 64}
        (folder / "config.json").write_text(json.dumps(text), encoding="utf-8")
    words = [w.replace("draft=[none,eagle3]", "draft=[none,tuned,eagle3,mixed,seed]") for w in small("eagle3")]
    more = (f"draft.seed.path={folder}", "corpus.taps=[0,1,2]", "budget.score_prompts=1", "decode.max_new_tokens=10")
    text, code = run(place.words(*words, *more))
    assert code == 0, text
    assert f"draft seed is left out: {reasons[why]}" in text
    assert "draft tuned is left out: it starts from seed" in text
    kinds = sorted(read(a / "draft" / "draft.json")["kind"] for a in place.complete("draft"))
    assert kinds == ["feature", "mixed", "none"], "look-up is mixed with the next of its list"
    text, code = run(place.words(*words, *more, "load.draft=tuned", stage="load"))
    assert (code, text.splitlines()[-1].split(":")[1]) == (2, " no draft 'tuned' in the list [load.draft]")


def test_a_draft_of_another_kind_is_no_start(tiny_place: Workplace, tmp_path: Path) -> None:
    target = load_causal_model(tiny_place.root / "target", precision="fp32", device=torch.device("cpu"))
    network = make_network(Medusa(layers=1, block=2), target, None, seed=0)
    save_network(network, tmp_path / "medusa")
    with pytest.raises(InputError, match="training of eagle3 cannot start from a draft of kind medusa"):
        go_on_from(tmp_path / "medusa", target, Eagle3(start_from="seed"))


def assert_writes_as_the_target_alone(place: Workplace, name: str, *, kind: str = "feature") -> None:
    pair = load_pair(place.champion, cache=place.cache)
    assert pair.info["draft"]["name"] == name and pair.drafter.kind == kind
    for prompt in ("code abc?", "chat gabe hid a cab?"):
        decoded = pair.generate(prompt, max_new_tokens=30).decoded
        expected = greedy(place.root / "target", pair.prompt_tokens(prompt), count=30, stops=stop_tokens(pair.target))
        assert decoded.tokens == expected and sum(decoded.proposed) > 0


# What the corpus keeps


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of features, states, tokens and masks of a corpus, and its numbers of tokens, as they lie on the disk."""
    found = {"features": 0, "states": 0, "tokens": 0, "mask": 0, "count": 0}
    for file in folder.glob("shard-*.safetensors"):
        for name, tensor in load_file(file).items():
            if name in found:
                found[name] += tensor.nbytes
            if name == "tokens":
                found["count"] += tensor.shape[0]
    return found


def test_the_corpus_keeps_features_beside_its_shards(featured: Finished) -> None:
    artifact = Artifact.load(featured.place.only("corpus"))
    assert feature_files(artifact.path) == FIVE and set(FIVE) <= artifact.manifest["files"].keys()
    for index, shard in enumerate(read_shards(artifact.path)):
        with safe_open(artifact.path / FIVE[index], framework="pt") as file:
            assert json.loads(file.metadata()["taps"]) == [0, 1, 2]
            kept = file.get_tensor("features")
        assert kept.dtype == torch.bfloat16
        assert kept.shape == (sum(sample.tokens.shape[0] for sample in shard), 3 * HIDDEN)
        ends = torch.tensor([sample.tokens.shape[0] for sample in shard]).cumsum(0) - 1
        assert (kept[ends] == 0).all() and int((kept == 0).all(1).sum()) == len(shard), "only last rows are empty"
    disk = sizes(artifact.path)
    per_token = artifact.metrics["feature_bytes_per_token"]
    assert per_token["kept"] == round(sum(disk[n] for n in ("features", "states", "tokens", "mask")) / disk["count"])
    # Three taps and the last state everywhere, an int32 token and two masks of a byte.
    assert per_token["reference_cache"] == 4 * HIDDEN * BYTES + 4 + 1 + 1
    assert f"features: {per_token['kept']} bytes a token kept, {per_token['reference_cache']} in" in featured.out


def test_a_training_that_needs_no_layer_of_its_target_loads_none(
    featured: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: Any, **named: Any) -> None:
        raise AssertionError("the target was loaded whole")

    for name in ("load_causal_model", "load_target"):
        monkeypatch.setattr(training, name, refused)
    place = copied(featured.place, tmp_path / "place", "plan", "corpus")
    words = (*small(*KINDS), "corpus.taps=[0,1,2]", "draft.dspark.taps=[2,0]", "draft.eagle3.taps=[0,1,2]")
    anew = ("draft.dspark.init=random", "draft.dflash.init=random", "trainer.steps=2")
    text, code = run(place.words(*words, *anew, stage="build"))
    assert code == 0, text


def test_compressed_features_train_a_draft_and_take_half_the_room(featured: Finished, tmp_path: Path) -> None:
    place = copied(featured.place, tmp_path / "place", "plan")
    text, code = run(place.words(*alone("dspark"), "corpus.compress_features=true", stage="build"))
    assert code == 2 and "no output of the corpus stage" in text, "another corpus than the one that is there"
    for stage in ("corpus", "build"):
        text, code = run(place.words(*alone("dspark"), "corpus.compress_features=true", stage=stage))
        assert code == 0, text
    corpora = [Artifact.load(each.only("corpus")) for each in (featured.place, place)]
    kept = [artifact.metrics["feature_bytes_per_token"]["kept"] for artifact in corpora]
    # Three taps: 2 bytes a number, or 1 and a scale of 4 for each tap.
    assert kept[0] - kept[1] == 3 * (HIDDEN - 4)
    with safe_open(corpora[1].path / FIVE[0], framework="pt") as file:
        assert file.get_tensor("features").dtype == torch.int8
    assert metrics(place, "dspark").keys() == metrics(featured.place, "dspark").keys()


def test_the_size_of_the_features_is_said_before_any_is_written(featured: Finished) -> None:
    lines = featured.out.splitlines()
    said = lines.index("features of layers 0, 1, 2: at most 0 MiB")
    assert said < lines.index("a file of features") and lines.count("a file of features") == len(FIVE)


class Room(NamedTuple):
    """How much room there is for features that need `size` bytes: in the settings, and on the disk."""

    gib: Callable[[int], float]
    free: Callable[[int], int]


ROOMS: dict[str, tuple[Room, bool]] = {
    "as many GiB as they may need": (Room(lambda size: size / 2**30, lambda size: 2 * size), True),
    "one byte less": (Room(lambda size: (size - 1) / 2**30, lambda size: 100 * size), False),
    "a disk less than twice as free": (Room(lambda size: 4.0, lambda size: 2 * size - 1), False),
}


def disk_with(free: int) -> Callable[[Path], Any]:
    """A `shutil.disk_usage` that finds this much free."""
    usage = type(shutil.disk_usage("/"))
    return lambda folder: usage(2**50, 2**50 - free, free)


@pytest.mark.parametrize("name", ROOMS)
def test_features_are_kept_if_there_is_room_for_the_longest_answers(
    featured: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Room is needed for every prompt as it is rendered and as many tokens as its answer may have."""
    room, kept = ROOMS[name]
    samples = [sample for shard in read_shards(featured.place.only("corpus")) for sample in shard]
    size = sum(int((~s.mask).sum()) + ANSWER for s in samples) * 3 * HIDDEN * BYTES
    place = featured.place.again(tmp_path / "place")
    monkeypatch.setattr(shutil, "disk_usage", disk_with(room.free(size)))
    text, code = run(place.words(*CORPUS, f"corpus.features_gib={room.gib(size)!r}", stage="corpus"))
    assert code == 0, text
    assert feature_files(place.only("corpus")) == (FIVE if kept else [])
    assert ("feature_bytes_per_token" in read(place.only("corpus") / "manifest.json")["metrics"]) == kept
    refused = "features of layers 0, 1, 2: at most 0 MiB, more than the 0 MiB there is room for: not kept"
    assert (refused in text.splitlines()) == (not kept)


def test_a_corpus_that_is_to_keep_no_features_differs_in_nothing_else(featured: Finished, captured: Captured) -> None:
    folder = captured.place.only("corpus")
    assert feature_files(folder) == []
    assert "feature_bytes_per_token" not in read(folder / "manifest.json")["metrics"]
    for name, content in contents(folder).items():
        if name != "manifest.json":
            assert (featured.place.only("corpus") / name).read_bytes() == content, name


# With kept features and without


def assert_near(kept: torch.Tensor, whole: torch.Tensor) -> None:
    """Equal but for the rounding of bf16: one unit in the last place, and what fp32 adds up in another order."""
    torch.testing.assert_close(kept.float(), whole.float(), rtol=2**-7, atol=1e-4)


def assert_features_of_whole_passes(place: Workplace, taps: list[int], samples: Sequence[Sequence[Sample]]) -> None:
    target = load_causal_model(place.root / "target", precision="fp32", device=torch.device("cpu"))
    kept = FeatureShards(place.only("corpus"), [list(shard) for shard in samples], taps=taps)
    for shard in samples:
        for sample in shard:
            # The last token was never fed.
            assert_near(kept.of(sample)[:-1], capture_features(target, sample, taps)[:-1])


def test_kept_features_are_those_of_one_pass_over_the_whole_conversation(featured: Finished) -> None:
    assert_features_of_whole_passes(featured.place, [2, 0], read_shards(featured.place.only("corpus")))


@pytest.fixture(scope="module")
def several_turns(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with a corpus of which some conversations have two or three turns. Read only."""
    place = tiny_place.again(tmp_path_factory.mktemp("turns"))
    (place.root / "chat.jsonl").unlink()
    asked = [
        {"messages": [{"role": "user", "content": f"{letter} why?"}] * turns}
        for letter, turns in zip("abcdef", [1, 2, 3] * 2, strict=True)
    ]
    (place.root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        text, code = run(place.words(*CORPUS, stage="corpus"))
    assert code == 0, text
    return place


def test_features_of_several_turns_are_those_of_the_whole_conversation_too(several_turns: Workplace) -> None:
    shards = read_shards(several_turns.only("corpus"))
    turns = [int((sample.mask[1:] & ~sample.mask[:-1]).sum()) for shard in shards for sample in shard]
    assert set(turns) == {1, 2, 3}
    assert_features_of_whole_passes(several_turns, [0, 2], shards)


def test_room_is_needed_for_every_turn(several_turns: Workplace, tmp_path: Path) -> None:
    """The features that were kept do not fit into a byte less than they take."""
    taken = sizes(several_turns.only("corpus"))["features"]
    place = several_turns.again(tmp_path / "place")
    text, code = run(place.words(*CORPUS, f"corpus.features_gib={(taken - 1) / 2**30!r}", stage="corpus"))
    assert code == 0, text
    assert feature_files(place.only("corpus")) == []


def test_features_that_were_not_kept_are_captured_while_a_draft_is_built(captured: Captured) -> None:
    assert captured.beside == [FIVE] * 3, "one file a shard beside each draft while it learned"
    for kind in KINDS:
        taps = ", ".join(map(str, TAPS[kind]))
        assert f"the corpus kept no features of layers [{taps}]: capturing 0 MiB" in captured.out
        artifact = Artifact.load(captured.place.draft(kind))
        artifact.verify()
        assert not (artifact.path / "features").exists()
        assert not any("features" in name for name in artifact.manifest["files"])


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_learn_alike_from_kept_and_from_captured_features(
    featured: Finished, captured: Captured, kind: str
) -> None:
    kept, later = (metrics(place, kind) for place in (featured.place, captured.place))
    assert kept["covered_mass"] == later["covered_mass"] and kept["tokens"] == later["tokens"]
    names = [name for name in kept if name.startswith(("eval/acceptance", "eval/tau")) and name != "eval/tau_greedy"]
    assert len(names) == 8
    for name in names:
        assert later[name] == pytest.approx(kept[name], abs=0.002), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_of_captured_features_decodes(captured: Captured, kind: str) -> None:
    target = load_causal_model(captured.place.root / "target", precision="fp32", device=torch.device("cpu"))
    folder = captured.place.draft(kind) / "draft"
    drafter = load_drafter(LoadContext(folder, captured.place.root / "target", target, "fp32", target.device))
    prompt = read_shards(captured.place.only("corpus"))[0][0].tokens
    request = Request(settings=SamplingSettings(temperature=0.0), max_new_tokens=20, stop_tokens=stop_tokens(target))
    decoded = decode(
        target, drafter, prompt, request=request, lookahead=FixedLookahead(3), generator=TorchSource.seeded(0)
    )
    expected = greedy(captured.place.root / "target", prompt, count=20, stops=stop_tokens(target))
    assert decoded.tokens == expected and sum(decoded.proposed) > 0


def test_on_a_full_disk_the_target_runs_again_at_every_step_with_the_same_outcome(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = copied(captured.place, tmp_path / "place", "plan", "corpus")
    monkeypatch.setattr(shutil, "disk_usage", disk_with(2**10))
    written: list[Path] = []
    monkeypatch.setattr(capturing, "write_features", lambda folder, *_: written.append(folder))
    text, code = run(place.words(*alone("dspark"), UNKEPT, stage="build"))
    assert code == 0, text
    assert "features need 0 MiB, there is room for 0: the target runs again every step" in text.splitlines()
    assert not written
    assert contents(place.draft("dspark") / "draft") == contents(captured.place.draft("dspark") / "draft")


# Layers


def test_layers_that_the_corpus_did_not_keep_are_captured(featured: Finished, tmp_path: Path) -> None:
    """-1 is what enters the first layer; the corpus kept 0, 1 and 2."""
    place = copied(featured.place, tmp_path / "place", "plan", "corpus")
    words = [*small("dspark"), "draft.dspark.taps=[1,-1]", "corpus.taps=[0,1,2]", "trainer.steps=4"]
    text, code = run(place.words(*words, stage="build"))
    assert code == 0, text
    assert "the corpus kept no features of layers [1, -1]: capturing 0 MiB" in text
    assert read(place.draft("dspark") / "draft" / "config.json")["target_layer_ids"] == [1, -1]
    assert not (place.draft("dspark") / "features").exists()


FOREIGN: dict[str, tuple[str, str, str]] = {
    # name: stage, word, what the line must say
    "kept, past the last": ("corpus", "corpus.taps=[0,3]", "cannot tap layer 3 of 3 [corpus.taps]: name layers from"),
    "read, past the last": ("build", "draft.eagle3.taps=[3]", "cannot tap layer 3 of 3 [draft.eagle3.taps]: name"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_layers_that_the_target_does_not_have_are_one_line(featured: Finished, tmp_path: Path, name: str) -> None:
    stage, word, expected = FOREIGN[name]
    building = stage == "build"
    place = copied(featured.place, tmp_path / "place", *(["corpus"] if building else []))
    drafts = [*small("eagle3"), "corpus.taps=[0,1,2]"] if building else ["draft=[none]"]
    text, code = run(place.words(*drafts, word, stage=stage))
    assert_one_line(text, code, expected)
    assert [read(p / "manifest.json")["metrics"]["kind"] for p in place.complete("draft")] == ["none"] * building
    assert len(place.complete("corpus")) == building


def assert_one_line(text: str, code: int, expected: str) -> None:
    """Bad input: exit code 2 and one line that says what the test says."""
    assert code == 2, text
    lines = [line for line in text.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("dspark: ")] == lines[-1:], text
    assert expected in lines[-1] and "Traceback" not in text


@pytest.mark.parametrize("shard", [0, 2])
def test_features_that_were_damaged_are_one_line(featured: Finished, tmp_path: Path, shard: int) -> None:
    place = copied(featured.place, tmp_path / "place", "plan", "corpus")
    file = place.only("corpus") / FIVE[shard]
    file.write_bytes(file.read_bytes()[:-100])
    text, code = run(place.words(*alone("dspark"), stage="build"))
    assert_one_line(text, code, f"[{file}]: build the corpus again")


# Killed, and gone on


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs killable processes."""
    with Runner(tmp_path_factory.mktemp("runner")) as started:
        yield started


def test_a_killed_build_goes_on_with_its_features_and_from_its_checkpoint(
    runner: Runner, captured: Captured, tmp_path: Path
) -> None:
    """Killed while features are captured, and again while the draft learns, it ends as if nothing had happened."""
    place = copied(captured.place, tmp_path / "place", "plan", "corpus")
    words = [word for word in alone("dspark") if not word.startswith("trainer.checkpoint")]
    words = place.words(*words, UNKEPT, "trainer.checkpoint_every_steps=1", stage="build")
    draft = captured.place.draft("dspark")
    partial = place.artifacts / "draft" / f".partial-{draft.name}"
    written: list[int] = []
    for moment in (partial / "features" / FIVE[1], partial / "checkpoints" / "step-00000003"):
        process = runner.start(words)
        assert wait_until_there(moment, process=process), runner.said()
        kill_group(process)
        assert runner.end() == -9
        written.append((partial / "features" / FIVE[0]).stat().st_mtime_ns)
    assert written[0] == written[1], "a whole file of features is not written again"
    assert runner.run(words) == 0, runner.said()
    assert "resumed from step " in runner.said()
    assert contents(place.draft("dspark") / "draft") == contents(draft / "draft")
    assert not (place.draft("dspark") / "features").exists() and not (place.draft("dspark") / "checkpoints").exists()
    assert not list(place.artifacts.glob("*/.partial-*"))


def interrupted(*given: Any, **settings: Any) -> None:
    """Stands for whatever ends a run."""
    raise InputError("the run was interrupted")


def test_a_build_that_goes_on_when_the_disk_is_full_uses_what_it_has_captured(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own features are what fills the disk; none of them may end in the artifact."""
    place = copied(captured.place, tmp_path / "place", "plan", "corpus")
    words = place.words(*alone("dspark"), UNKEPT, stage="build")
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", interrupted)
        assert run(words)[1] == 2
    monkeypatch.setattr(shutil, "disk_usage", disk_with(2**10))
    text, code = run(words)
    assert code == 0, text
    assert "the target runs again" not in text
    assert not (place.draft("dspark") / "features").exists()
    assert contents(place.draft("dspark") / "draft") == contents(captured.place.draft("dspark") / "draft")


@pytest.mark.parametrize("begun", ["with room", "without"])
def test_a_corpus_that_goes_on_with_other_room_keeps_features_of_every_shard_or_of_none(
    featured: Finished, captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    """What it has kept itself is part of what fills the disk."""
    place = copied(featured.place, tmp_path / "place", "plan")
    whole = featured.place.only("corpus")
    # Two shards of five were written before the kill.
    partial = place.artifacts / "corpus" / f".partial-{whole.name}"
    partial.mkdir(parents=True)
    source = whole if begun == "with room" else captured.place.only("corpus")
    for file in [*source.glob("prompts.jsonl"), *source.glob("report.json"), *source.glob("shard-0000[01].*")]:
        shutil.copy(file, partial)
    monkeypatch.setattr(shutil, "disk_usage", disk_with(2**10 if begun == "with room" else 2**40))
    text, code = run(place.words(*CORPUS, stage="corpus"))
    assert code == 0, text
    assert "resuming in" in text and place.only("corpus").name == whole.name
    assert feature_files(place.only("corpus")) in ([], FIVE)


# Settings


WRONG: dict[str, str] = {
    # word: what the line must say
    "draft.dspark.block=0": "draft.dspark.block is 0; use at least 1",
    "draft.dspark.markov_head=nonsense": "draft.dspark.markov_head is 'nonsense'; choose one of markov, gated, rnn",
    "draft.dflash.init=other": "draft.dflash.init is 'other'; choose one of target, random",
    "draft.eagle3.layers=2": "draft.eagle3.layers is 2; EAGLE-3 has one layer",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_setting_is_one_line(tiny_place: Workplace, tmp_path: Path, word: str) -> None:
    place = tiny_place.again(tmp_path / "place")
    text, code = run(place.words(f"draft=[none,{word.split('.')[1]}]", word))
    assert_one_line(text, code, WRONG[word])
    assert not place.artifacts.exists()


# The plan

PROFILE = DeviceProfile(
    device="a made-up machine",
    versions={"torch": "0"},
    passes={"fp32": dict.fromkeys(WIDTHS, 0.010)},
    spread={"fp32": dict.fromkeys(WIDTHS, 0.0001)},
    train={"fp32": {"layer": 1e-4, "head": 2e-4}},
)


def test_more_work_in_a_step_gives_fewer_steps(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "device_profile", lambda target, cache: PROFILE)
    config.register()
    own = [w for w in tiny_place.words(*small("dspark")) if not w.startswith(("budget.", "trainer.", "hydra."))]
    with initialize_config_module("conf", version_base="1.3"):
        cfg = config.typed(compose("config", overrides=[*own, "budget.training_minutes=1"]))

    def steps(**settings: int) -> int:
        draft = {**cfg.draft, "dspark": dataclasses.replace(cfg.draft["dspark"], **settings)}
        made, _ = plan.make_plan(dataclasses.replace(cfg, draft=draft), Store(tmp_path), target_digest="d")
        return made.steps["dspark"]

    # Answers of 0.75 * 12 = 9 tokens after prompts of 110. 4 anchors with 3 slots each go through 2 layers, 119 tokens
    # are projected at half a layer each: 24 + 59.5 = 83.5 token-layers; 12 slots go through 64 / 259 of the head: 2.97.
    # 4 conversations a step: (83.5 * 1e-4 + 2.97 * 2e-4) * 4 = 0.03577 s, 1.25 times that with overhead: 1341 a minute.
    assert steps() == 1341
    # All 259 tokens: 12 whole heads, (0.00835 + 0.0024) * 4 * 1.25 = 0.0538 s.
    assert steps(vocabulary=0) == steps(vocabulary=1000) == 1116
    assert steps(sequences_per_step=8) == 1341 // 2
    for name, values in {"anchors": (2, 4, 8), "vocabulary": (32, 64, 128, 0), "block": (1, 3, 7)}.items():
        counts = [steps(**{name: value}) for value in values]
        assert counts == sorted(set(counts), reverse=True), name
    assert steps(anchors=9) == steps(anchors=100), "an answer of 9 tokens has no more places for anchors"
