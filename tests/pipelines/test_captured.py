"""A score by captured rounds: who is captured, that nothing but time differs, how blocks are chosen, and what is said.

On the CPU the same rounds run uncaptured.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inference import block_length
from inference.block_length import BlockChoice
from inference.decoder import decode
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.graphed import decode as decode_module
from inference.graphed.arms import decoder_of_capacity
from inference.graphed.decode import GraphedDecoder
from inference.graphed.rounds import Rounds
from inference.graphed.timing import RoundSeconds
from inference.lookahead import Chances, Measured
from inference.lookahead.fixed import FixedLookahead, tree_of, tree_when_sampled
from inference.lookahead.scheduled import Config as Scheduled
from inference.lookahead.scheduled import ScheduledLookahead
from inference.pair import load_lookahead, load_pair
from inference.request import Decoded
from inference.scoring import Arm
from inference.tree_choice import WeighedTree, fastest_tree
from inference.trees import Tree
from pipelines import captured as captured_module
from pipelines import publish, score, select
from pipelines import verify as verify_module
from pipelines.captured import captured_markdown, prepared
from pipelines.drift.monitor import references
from pipelines.score_files import CHAINS_FILE, RECORDS_FILE, read_records
from pipelines.score_plan import ScorePlan
from pipelines.select import Decision, decide
from pipelines.stage_config import ScoreConfig
from pipelines.verify import faithful, read_checks
from tests.inference.test_feature_drafts import CONFIGS, network_for
from tests.inference.test_graphed_arms import captured, lean
from tests.pipelines.tiny import Workplace, read, records, run, token_digests

BLOCK = 3
DRAFTS = (
    "draft=[none,lookup,dspark,eagle3]",
    *(
        f"draft.{kind}.{name}={size}"
        for kind in ("dspark", "eagle3")
        for name, size in {"vocabulary": 64, "block": BLOCK, "anchors": 4}.items()
    ),
    "corpus.taps=[0,1,2]",
    "draft.eagle3.taps=[0,1,2]",
    "score.decode_best=0",
    "score.validation_prompts=1",
    "budget.score_prompts=1",
    "decode.max_new_tokens=12",
    "lookahead.trees=[]",
)
ON = "score.captured=on"


@pytest.fixture(scope="module")
def built(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace whose drafts are built and not scored. Read only."""
    place = tiny_place.again(tmp_path_factory.mktemp("built"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        for stage in ("corpus", "build"):
            out, code = run(place.words(*DRAFTS, stage=stage))
            assert code == 0, out
    return place


@pytest.fixture
def place(built: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A copy to score in."""
    monkeypatch.chdir(tmp_path)
    # Requests of microseconds: on a busy machine their speeds say nothing.
    monkeypatch.setattr(score, "_ABOVE_TAU", 100.0)
    own = built.again(tmp_path / "place")
    for kind in ("plan", "corpus", "draft"):
        shutil.copytree(built.artifacts / kind, own.artifacts / kind)
    return own


def scored(place: Workplace, *words: str) -> tuple[Path, str]:
    """Score; returns the folder of this score, and what was printed."""
    before = set(place.complete("score"))
    out, code = run(place.words(*DRAFTS, *words, stage="score"))
    assert code == 0, out
    [folder] = set(place.complete("score")) - before
    return folder, out


def greedy(folder: Path) -> dict[tuple[str, str], str]:
    """What each arm wrote at temperature 0."""
    return {(prompt, arm): digest for (prompt, t, arm), digest in token_digests(folder).items() if t == 0.0}


def fake_rounds(
    monkeypatch: pytest.MonkeyPatch,
    *,
    draft: float,
    rest: float = 0.0,
    target_only: float = 1.0,
    tree: float = 1.0,
    sampled_tree: float = 1e3,
) -> None:
    """Rounds that take made-up times: a second, and for each token of a chain so much of drafting and of the rest."""

    def seconds(rounds: Rounds, *, length: int, sampled: bool) -> RoundSeconds:
        if rounds.proposes_tree(sampled=sampled):
            took = sampled_tree if sampled else tree
            return RoundSeconds(took, 0.0, took)
        if not rounds.block:
            return RoundSeconds(target_only, 0.0, target_only)
        drafting = rounds.block * draft
        return RoundSeconds(1.0 + drafting + rounds.block * rest, drafting, 1.0 + rounds.block * rest)

    monkeypatch.setattr(decode_module, "round_seconds", seconds)


# Nothing but time


def test_greedy_answers_are_those_of_uncaptured_arms(place: Workplace) -> None:
    (captured, out), (plain, _) = scored(place, ON), scored(place, "score.captured=off")
    assert [read(f / "manifest.json")["config"]["captured"] for f in (captured, plain)] == [True, False]
    assert greedy(captured) == greedy(plain) and len(greedy(captured)) == 4 * 3
    assert all(row["mismatch"] is None for row in records(captured))
    lines = [line for line in out.splitlines() if "captured rounds:" in line]
    expected = "captured rounds: none, dspark, eagle3; kernel by kernel, as no drafts that read features: lookup"
    assert len(lines) == 1 and expected in lines[0]
    data = read(captured / "scorecard.json")
    assert data["captured"] == ["dspark", "eagle3", "none"] and read(plain / "scorecard.json")["captured"] == []
    assert {row["arm"] for row in records(captured)} == {"none", "lookup", "dspark", "eagle3"}
    # What is proposed is fixed, whatever room the budget leaves.
    for name in ("dspark", "eagle3"):
        tokens = data["blocks"][name]["tokens"]
        assert 1 <= tokens <= BLOCK and data["blocks"][name]["siblings"] == []
        assert {*map(str, [tokens])} == {n for row in records(captured) if row["arm"] == name for n in row["blocks"]}
    page = (captured / "scorecard.md").read_text()
    assert "## Captured rounds" in page and "| draft | block | target-only | 1 | 2 | 3 |" in page
    assert "## Captured rounds" not in (plain / "scorecard.md").read_text()
    assert "| dspark |" not in page.partition("## Milliseconds of drafting")[2]


def test_all_is_captured_before_the_first_held_out_prompt(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured within an answer would be timed with it."""
    seen: list[tuple[int, int, set[bool]] | str] = []
    prepare, measure = GraphedDecoder.prepare, score._measure

    def preparing(self: GraphedDecoder, *, longest_prompt: int, sampled: Any) -> None:
        seen.append((self.rounds.block, longest_prompt, set(sampled)))
        prepare(self, longest_prompt=longest_prompt, sampled=sampled)

    def measuring(*given: Any) -> None:
        seen.append("held-out prompts")
        measure(*given)

    monkeypatch.setattr(GraphedDecoder, "prepare", preparing)
    monkeypatch.setattr(score, "_measure", measuring)
    folder, _ = scored(place, ON, "score.max_prompt_tokens=200")
    blocks = read(folder / "scorecard.json")["blocks"]
    arms = [0, *(blocks[name]["tokens"] for name in ("dspark", "eagle3"))]
    assert seen[-4:] == [*((block, 200, {False, True}) for block in arms), "held-out prompts"]


# The block


def test_blocks_are_chosen_by_what_captured_rounds_take(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    # A token that never stood is worth its place where it makes the round cheaper.
    fake_rounds(monkeypatch, draft=0.0, rest=-0.1)
    free, _ = scored(place, ON)
    fake_rounds(monkeypatch, draft=50.0)
    dear, _ = scored(place, ON, "score.prescore_prompts=2")
    for name in ("dspark", "eagle3"):
        assert read(free / "scorecard.json")["blocks"][name]["tokens"] == BLOCK
        assert read(dear / "scorecard.json")["blocks"][name]["tokens"] == 1
    plan = read(dear / "score_plan.json")
    assert set(plan["captured"]) == {"none", "dspark", "eagle3"}
    costs = plan["captured"]["eagle3"]
    assert costs["token_seconds"] == pytest.approx(50.0) and costs["passes"]["1"] == 1.0
    # What adaptive policies start from are the same costs, whole.
    assert read(dear / "scorecard.json")["measured"]["eagle3"]["costs"] == costs


def test_the_pre_score_ranks_by_captured_rounds_and_their_baseline(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounds so slow beside the device profile that look-up, uncaptured, seems fast: against a baseline as slow it is.
    fake_rounds(monkeypatch, draft=0.0, target_only=2.0)
    folder, _ = scored(place, ON, "score.decode_best=1", "score.prescore_prompts=1")
    known = {row["arm"]: row["prescore"] for row in read(folder / "prescore.json")["candidates"]}
    # Rounds of a second against two: twice tau, over all temperatures together.
    for name in ("dspark", "eagle3"):
        taus = known[name]["taus"].values()
        assert 1.99 * min(taus) <= known[name]["speedup"] <= 2.01 * max(taus)
    assert known["lookup"]["speedup"] > 10.0


def test_a_policy_that_is_not_fixed_is_said_and_written_down(place: Workplace) -> None:
    folder, out = scored(place, ON, "lookahead=scheduled", "lookahead.tokens=0")
    line = "captured rounds propose a fixed number of tokens: dspark, eagle3 without lookahead=scheduled"
    assert sum(line in row for row in out.splitlines()) == 1
    plan = read(folder / "score_plan.json")
    assert plan["policies"] == {"lookup": "scheduled", "dspark": "fixed", "eagle3": "fixed"}
    assert read(folder / "scorecard.json")["policies"] == plan["policies"]


def test_a_length_of_ones_own_is_taken_as_far_as_the_draft_goes(place: Workplace) -> None:
    folder, _ = scored(place, ON, "lookahead.tokens=8", "lookahead.siblings=[2]")
    blocks = read(folder / "scorecard.json")["blocks"]
    assert blocks["dspark"] == blocks["eagle3"] == {"tokens": BLOCK, "siblings": []}
    assert blocks["lookup"] == {"tokens": 8, "siblings": [2]}


def test_a_length_that_was_chosen_for_another_draft_is_cut_to_what_there_is() -> None:
    """As a gate does, whose arms all propose as suits one of them."""
    target = lean("llama", max_position_embeddings=256)
    network = network_for(CONFIGS["eagle3"], target)
    cfg = SimpleNamespace(score=ScoreConfig(temperatures=[0.0], max_prompt_tokens=100))
    arm = Arm("draft", target, FeatureDrafter(network), FixedLookahead(0), captured(target, network))
    for tokens, block in ((1, 1), (10, network.block)):
        decoder = prepared(SimpleNamespace(cfg=cfg), arm, tokens)  # type: ignore[arg-type]
        assert decoder is not None and decoder.rounds.block == block
    assert prepared(SimpleNamespace(cfg=cfg), dataclasses.replace(arm, captured=None), 2) is None  # type: ignore[arg-type]


def test_a_tree_for_another_draft_is_cut_to_what_there_is() -> None:
    target = lean("llama", max_position_embeddings=256)
    network = network_for(CONFIGS["dspark"], target)
    cfg = SimpleNamespace(score=ScoreConfig(temperatures=[0.0], max_prompt_tokens=100))
    arm = Arm("draft", target, FeatureDrafter(network), FixedLookahead(0), captured(target, network))
    tree = Tree.chain(network.deepest + 3, lookup=12)
    for when_sampled in (False, True):
        decoder = prepared(SimpleNamespace(cfg=cfg), arm, 1, tree, tree_when_sampled=when_sampled)  # type: ignore[arg-type]
        assert decoder is not None and decoder.rounds.block == 1
        assert decoder.tree == Tree.chain(network.deepest, lookup=12)
        assert decoder.rounds.tree_when_sampled is when_sampled


# Trees


TREES = (
    "lookahead.trees=[2,70]",
    "lookahead.tree_depths=[1,2]",
    "lookahead.tree_lookup=3",
    "decode.max_new_tokens=24",
)


@pytest.mark.parametrize("when_sampled", [False, True])
def test_a_tree_that_pays_is_chosen_and_requests_go_by_it_where_it_does(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, when_sampled: bool
) -> None:
    fake_rounds(monkeypatch, draft=0.0, tree=1e-3, sampled_tree=1e-3 if when_sampled else 1e3)
    asked: dict[str, list[str]] = {}

    def noting(name: str, weighing: Any) -> Any:
        def noted(decoder: Any, other: Any, prompts: Any, **named: Any) -> Any:
            asked.setdefault(name, []).extend(prompt.id for prompt in prompts)
            return weighing(decoder, other, prompts, **named)

        return noted

    for name in ("continuations", "weigh_sampled"):
        monkeypatch.setattr(captured_module, name, noting(name, getattr(captured_module, name)))
    programs: list[set[str]] = []
    measure = score._measure

    def measured(context: Any, arms: dict[str, Arm], *given: Any) -> None:
        measure(context, arms, *given)
        programs.extend(
            {str(name[0]) for name in arm.captured.rounds.programs.names} for arm in arms.values() if arm.captured
        )

    monkeypatch.setattr(score, "_measure", measured)
    folder, out = scored(place, ON, *TREES, "score.temperatures=[0.0,1.0]")
    plan, data = read(folder / "score_plan.json"), read(folder / "scorecard.json")
    assert asked["continuations"] and asked["continuations"] == asked["weigh_sampled"]
    assert not set(asked["continuations"]) & set(plan["prompts"]), "never on held-out prompts"
    assert ["tree" in names for names in programs] == [False, True, True], "of the baseline none"
    page = (folder / "scorecard.md").read_text()
    for name in ("dspark", "eagle3"):
        tree = Tree.from_json(plan["blocks"][name]["tree"], where="score plan")
        assert 1 <= len(tree.paths) <= 70 and tree.drafted_depth <= 2 and tree.lookup == 3
        rounds, tokens = data["captured_rounds"][name], data["blocks"][name]["tokens"]
        assert (rounds["tree"], rounds["tokens"]) == (tree.to_json(), tokens)
        assert rounds["tree_when_sampled"] is plan["blocks"][name]["tree_when_sampled"] is when_sampled
        # A request may fill the target's context of 320, and a round of 73 tokens lie beyond: whole steps of 64.
        assert rounds["positions"] == 448
        blocks = {
            t: {b for r in records(folder) if (r["arm"], r["temperature"]) == (name, t) for b in r["blocks"]}
            for t in (0.0, 1.0)
        }
        assert blocks == {0.0: {str(tree.size)}, 1.0: {str(tree.size if when_sampled else tokens)}}
        assert (
            sum(f"{name}: greedy rounds propose the tree; the best tree has" in line for line in out.splitlines()) == 1
        )
        proposing = "the tree" if when_sampled else "the chain"
        line = f"{name}: sampled rounds propose {proposing}; at temperature 1 the tree of {tree.size} has tau "
        assert sum(line in row for row in out.splitlines()) == 1
        assert (
            f"| {name} | greedy | tree of {tree.size} | {tree.drafted_depth} | 3 |" in page
            and f"{tokens} or a tree of {tree.size}" in page
        )
        weighed, sampled = plan["blocks"][name]["weighed"], plan["blocks"][name]["weighed_sampled"]
        for chain in (weighed[0], sampled[0]):
            assert chain["tree"] == Tree.chain(tokens).to_json() and chain["seconds"] == 1.0
        assert (
            sampled[1]["tree"] == tree.to_json() and len(sampled) == 2 and min(each["tau"] for each in sampled) >= 1.0
        )
        for each, kind, chosen in zip(sampled, ("chain", "tree"), (not when_sampled, when_sampled), strict=True):
            (row,) = (line for line in page.splitlines() if f"| {name} | sampled | {kind} of " in line)
            assert f"| {each['tau']:.2f} | {1e3 * each['seconds']:.2f} |" in row
            assert row.endswith("| yes |" if chosen else "| no |")
        # What adaptive policies start from is about chains.
        assert set(plan["captured"][name]["passes"]) == {str(1 + n) for n in range(BLOCK + 1)}
    assert data["captured_rounds"]["none"]["tree"] is None
    assert data["captured_rounds"]["none"]["tree_when_sampled"] is False
    # What a server will do with these drafts was decoded too, once, and no figure is taken from it.
    chains = read_records(folder / CHAINS_FILE)
    by_trees = (0.0, 1.0) if when_sampled else (0.0,)
    wanted = {(name, prompt, t) for name in ("dspark", "eagle3") for prompt in plan["prompts"] for t in by_trees}
    assert sorted((own.arm, own.prompt_id, own.temperature) for own in chains) == sorted(wanted)
    assert {(own.arm, *own.blocks) for own in chains} == {
        (name, str(data["blocks"][name]["tokens"])) for name in ("dspark", "eagle3")
    }
    assert all(row["mismatch"] is None for row in records(folder))
    answers = greedy(folder)
    for prompt, arm in answers:
        assert answers[prompt, arm] == answers[prompt, "none"]


def test_a_tree_that_does_not_pay_is_not_taken(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rounds(monkeypatch, draft=0.0, tree=1e3)
    folder, out = scored(place, ON, *TREES, "score.temperatures=[0.0]")
    for name in ("dspark", "eagle3"):
        choice = read(folder / "score_plan.json")["blocks"][name]
        assert choice["tree"] is None and choice["weighed"]
        assert choice["tree_when_sampled"] is False and not choice["weighed_sampled"]
        assert read(folder / "scorecard.json")["captured_rounds"][name]["tree"] is None
        assert {b for r in records(folder) if r["arm"] == name for b in r["blocks"]} == {str(choice["tokens"])}
        assert (
            sum(f"{name}: greedy rounds propose the chain; the best tree has" in line for line in out.splitlines()) == 1
        )


@pytest.mark.parametrize(
    ("temperatures", "tree"), [([0.0], Tree.of([(0,), (1,)])), ([0.0, 1.0], Tree.chain(2)), ([1.0], Tree.of([(1,)]))]
)
def test_greedy_scores_and_trees_of_one_token_at_every_depth_leave_sampled_rounds_the_chain(
    temperatures: list[float], tree: Tree
) -> None:
    target = lean("llama", max_position_embeddings=256)
    decoder = captured(target, network_for(CONFIGS["eagle3"], target))
    context: Any = SimpleNamespace(cfg=SimpleNamespace(score=ScoreConfig(temperatures=temperatures)))
    choice = BlockChoice(1, [0.5], 0.0, [1.0], tree=tree)
    assert captured_module._with_sampled(context, "draft", decoder, choice, tree, [], frozenset()) is choice


def test_without_greedy_requests_no_tree_is_weighed(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def weighing(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled requests go by chains")

    monkeypatch.setattr(captured_module, "continuations", weighing)
    folder, _ = scored(place, ON, *TREES, "score.temperatures=[1.0]")
    assert all(not choice["weighed"] for choice in read(folder / "score_plan.json")["blocks"].values())


def test_a_plan_is_read_back_and_older_ones_too() -> None:
    trees = [WeighedTree(Tree.chain(2), 1.5, 0.1), WeighedTree(Tree.of([(0,), (1,)], lookup=4), 1.25, 0.05)]
    greedy = BlockChoice(2, [0.5], 0.0, [1.0], siblings=[1], tree=trees[1].tree, weighed=trees)
    choice = dataclasses.replace(greedy, tree_when_sampled=True, weighed_sampled=trees[::-1])
    assert BlockChoice.from_json(json.loads(json.dumps(choice.to_json())), where="plan") == choice
    older = choice.to_json()
    del older["tree_when_sampled"], older["weighed_sampled"]
    assert BlockChoice.from_json(older, where="plan") == greedy
    del older["tree"], older["weighed"]
    assert BlockChoice.from_json(older, where="plan") == dataclasses.replace(greedy, tree=None, weighed=[])
    with pytest.raises(ValueError, match="tree_when_sampled needs a tree"):
        dataclasses.replace(choice, tree=None)
    other = BlockChoice(4, [0.25], 0.5, [2.0])
    assert other.shaped_as(choice).shaped_as(other) == other
    shaped = other.shaped_as(choice)
    assert (shaped.tokens, shaped.siblings, shaped.tree, shaped.tree_when_sampled) == (2, [1], choice.tree, True)
    assert (shaped.conditional, shaped.weighed) == ([0.25], [])
    assert trees[1].rate == 25.0 and fastest_tree(trees) == trees[1].tree
    assert fastest_tree(trees[:1]) is None and fastest_tree([trees[1], trees[0]]) is None


# Published


def won_by(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Which arm is the fastest on a tiny model is the machine's mood: let one win."""

    def decided(*given: Any, **named: Any) -> Decision:
        return dataclasses.replace(decide(*given, **named), winner=name)

    monkeypatch.setattr(select, "decide", decided)


def published(place: Workplace, *words: str) -> tuple[Path, str]:
    """All stages; returns the version's folder, and what was printed."""
    out, code = run(place.words(*DRAFTS, *words))
    assert code == 0, out
    return place.versions / "v1", out


SCHEDULED = ("lookahead=scheduled", "lookahead.tokens=0")
CHANCES = Chances("margin", curves=((0.25, 0.5),))


@pytest.mark.parametrize("winner", ["dspark", "eagle3"])
def test_a_pair_names_the_policy_it_was_measured_with_and_keeps_what_others_need(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    won_by(monkeypatch, winner)
    monkeypatch.setattr("pipelines.score_plan.calibrate", lambda *_, **__: CHANCES)
    folder, out = published(place, ON, *SCHEDULED, "score.temperatures=[0.0,1.0]")
    block = read(folder / "scorecard.json")["blocks"][winner]["tokens"]
    line = f"{winner} was measured by captured rounds, so the pair names a fixed block of {block} tokens and not "
    assert sum(line + "lookahead=scheduled" in row for row in out.splitlines()) == 1
    decoding = read(folder / "pair.json")["decoding"]
    assert (decoding["lookahead"]["kind"], decoding["lookahead"]["tokens"]) == ("fixed", block)
    pair = load_pair(folder, cache=place.cache)
    assert isinstance(pair.lookahead, FixedLookahead) and pair.lookahead.longest == block
    # The documented way to the policy that was configured.
    measured = Measured.from_json(decoding["measured"], where="pair.json")
    assert measured.chances == CHANCES
    assert measured.costs.to_json() == read(place.only("score") / "score_plan.json")["captured"][winner]
    policy = load_lookahead({"kind": "scheduled", "tokens": block}, measured=lambda: measured)
    assert isinstance(policy, ScheduledLookahead) and policy.reads == {"confidence", "margin"}
    # Sampled answers repeat by captured rounds alone.
    checks = read_checks(folder)
    assert {check.temperature for check in checks} == {0.0, 1.0}
    assert all(check.captured_positions for check in checks)
    assert all(went for _, went in faithful(pair, checks))
    other = [dataclasses.replace(check, captured_positions=0) for check in checks]
    assert [went for check, went in faithful(pair, other) if check.temperature] == [False]


@pytest.mark.parametrize("when_sampled", [False, True])
def test_a_pair_has_the_tree_it_was_measured_with_and_decodes_by_it(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, when_sampled: bool
) -> None:
    won_by(monkeypatch, "eagle3")
    fake_rounds(monkeypatch, draft=0.0, tree=1e-3, sampled_tree=1e-3 if when_sampled else 1e3)
    folder, _ = published(place, ON, *TREES, "score.temperatures=[0.0,1.0]")
    decoding = read(folder / "pair.json")["decoding"]
    rounds = read(folder / "scorecard.json")["captured_rounds"]["eagle3"]
    assert decoding["lookahead"]["tree"] == rounds["tree"] and decoding["lookahead"]["trees"] == [2, 70]
    assert decoding["lookahead"].get("tree_when_sampled", False) is rounds["tree_when_sampled"] is when_sampled
    pair = load_pair(folder, cache=place.cache, captured="on")
    tree = Tree.from_json(rounds["tree"], where="scorecard")
    assert tree_of(pair.lookahead) == tree and pair.lookahead.longest == rounds["tokens"]
    assert tree_when_sampled(pair.lookahead) is when_sampled
    words = f"fixed lookahead of {rounds['tokens']}, trees of {tree.size} when "
    words += "captured" if when_sampled else "greedy and captured"
    assert f"{words}.\n" in (folder / "MODEL_CARD.md").read_text()
    # The scored requests repeat by rounds of the tree and of as many positions.
    made: list[GraphedDecoder] = []

    def decoder(*given: Any, **named: Any) -> GraphedDecoder:
        made.append(decoder_of_capacity(*given, **named))
        return made[-1]

    monkeypatch.setattr(verify_module, "decoder_of_capacity", decoder)
    checks = read_checks(folder)
    assert all(went for _, went in faithful(pair, checks)) and {c.temperature for c in checks} == {0.0, 1.0}
    assert [(own.tree, own.rounds.capacity) for own in made] == [(tree, rounds["positions"])]
    assert {"tree"} | ({"round"} if not when_sampled else set()) == {
        name[0] for name in made[0].rounds.programs.names if name[0] != "prompt"
    }
    # Requests by trees and by chains both have something to be held against.
    known = references([r for file in (RECORDS_FILE, CHAINS_FILE) for r in read_records(folder / file)], "eagle3")
    kinds = {"greedy", f"greedy by trees of {tree.size}", "sampled"}
    kinds |= {f"sampled by trees of {tree.size}"} if when_sampled else set()
    assert {name.partition(", ")[2] for name in known} == kinds
    # And so do any others, token for token the target's own.
    alone = dataclasses.replace(pair, lookahead=FixedLookahead(0), captured="off")
    given = pair.generate("why is the sky blue", max_new_tokens=30).decoded
    sampled = pair.generate("why is the sky blue", temperature=1.0, max_new_tokens=30).decoded
    assert set(given.blocks) == {tree.size} and set(sampled.blocks) == {tree.size if when_sampled else rounds["tokens"]}
    assert given.tokens == alone.generate("why is the sky blue", max_new_tokens=30).decoded.tokens


def test_a_pair_that_was_measured_without_captured_rounds_names_what_was_configured(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    won_by(monkeypatch, "lookup")
    folder, out = published(place, ON, *SCHEDULED)
    assert read(folder / "pair.json")["decoding"]["lookahead"]["kind"] == "scheduled"
    assert "so the pair names" not in out
    assert not any(check.captured_positions for check in read_checks(folder))


def test_a_block_that_was_cut_to_what_the_draft_has_is_published_as_it_was_measured() -> None:
    """As a gate may, whose arms all propose as suits one of them."""
    configured = Scheduled(longest_auto=9, tree_depths=[3], tree_lookup=2)
    context: Any = SimpleNamespace(cfg=SimpleNamespace(lookahead=configured))
    tree = Tree.of([(0,), (1,)], lookup=2)
    by_tree = {"tokens": 4, "tree": tree.to_json()}
    scorecard = {
        "blocks": {"draft": {"tokens": 10, "siblings": [1]}, "lookup": {"tokens": 10, "siblings": [1]}},
        "captured_rounds": {
            "draft": {"tokens": 4, "positions": 128},
            "tree": by_tree,
            "sampled": {**by_tree, "tree_when_sampled": True},
        },
    }
    named = publish._lookahead(context, scorecard, "draft")
    assert (named["kind"], named["tokens"], named["siblings"], named["longest_auto"]) == ("fixed", 4, [], 9)
    assert (named["tree_depths"], named["tree_lookup"]) == ([3], 2)
    assert isinstance(load_lookahead(named), FixedLookahead) and "tree" not in named
    with_tree = load_lookahead(publish._lookahead(context, scorecard, "tree"))
    assert with_tree.longest == 4 and tree_of(with_tree) == tree and not tree_when_sampled(with_tree)
    sampled = load_lookahead(publish._lookahead(context, scorecard, "sampled"))
    assert tree_of(sampled) == tree and tree_when_sampled(sampled)
    as_configured = publish._lookahead(context, scorecard, "lookup")
    assert (as_configured["kind"], as_configured["tokens"], as_configured["siblings"]) == ("scheduled", 10, [1])


# Calibrated


def test_captured_arms_are_calibrated_by_captured_rounds(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[str, int]] = []
    recorded: list[int] = []
    by_rounds = GraphedDecoder.decode

    def ordinary(target: Any, drafter: Drafter, *given: Any, **named: Any) -> Decoded:
        decoded.append((drafter.kind, named["request"].max_new_tokens))
        return decode(target, drafter, *given, **named)

    def captured(self: GraphedDecoder, *given: Any, **named: Any) -> Decoded:
        if named.get("recording") is not None:
            recorded.append(self.rounds.block)
        return by_rounds(self, *given, **named)

    monkeypatch.setattr(block_length, "decode", ordinary)
    monkeypatch.setattr(GraphedDecoder, "decode", captured)
    folder, _ = scored(place, ON, *SCHEDULED)
    # One validation prompt a domain, at two temperatures, with blocks of the length that was chosen.
    blocks = read(folder / "scorecard.json")["blocks"]
    assert recorded == [blocks[name]["tokens"] for name in ("dspark", "eagle3") for _ in range(3 * 2)]
    assert {kind for kind, _ in decoded} == {"lookup"}


# Killed, and gone on


@pytest.mark.parametrize("trees", [(), TREES])
def test_a_killed_score_goes_on_by_its_plan(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, trees: tuple[str, ...]
) -> None:
    fake_rounds(monkeypatch, draft=0.0, tree=1e-3)
    whole, _ = scored(place, ON, *trees)
    plan = read(whole / "score_plan.json")
    assert all((choice["tree"] is not None) == bool(trees) for n, choice in plan["blocks"].items() if n != "lookup")
    partial = whole.with_name(f".partial-{whole.name}")
    partial.mkdir()
    lines = (whole / "records.jsonl").read_bytes().splitlines(keepends=True)
    # Four arms a request: two requests, and one that is cut.
    (partial / "records.jsonl").write_bytes(b"".join(lines[:9]))
    shutil.copyfile(whole / "score_plan.json", partial / "score_plan.json")
    digests = token_digests(whole)
    shutil.rmtree(whole)

    def chosen_anew(*_: Any, **__: Any) -> None:
        raise AssertionError("blocks are in the plan")

    monkeypatch.setattr("pipelines.score_plan.choose_block", chosen_anew)
    monkeypatch.setattr("pipelines.score_plan.with_tree", chosen_anew)
    again, _ = scored(place, ON, *trees)
    assert read(again / "score_plan.json") == plan
    assert again == whole and token_digests(again) == digests
    assert (again / "records.jsonl").read_bytes().splitlines(keepends=True)[:8] == lines[:8]
    assert "## Captured rounds" in (again / "scorecard.md").read_text()


# What stands in the way


@pytest.mark.parametrize("word", ["decode.repetition_penalty=1.2", "decode.top_k=5", "decode.top_p=0.9"])
def test_other_sampling_settings_go_on_uncaptured_with_one_line(place: Workplace, word: str) -> None:
    folder, out = scored(place, ON, word, "score.temperatures=[1.0]")
    line = "no captured rounds: decode.top_k, decode.top_p and decode.repetition_penalty are more than they follow"
    assert sum(line in row for row in out.splitlines()) == 1
    assert read(folder / "scorecard.json")["captured"] == []
    assert read(folder / "manifest.json")["config"]["captured"] is False


def test_a_target_that_cannot_be_captured_is_one_line_where_it_was_asked_for(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.graphed.target.lean_layers", lambda model: None)
    out, code = run(place.words(*DRAFTS, ON, stage="score"))
    assert code == 2
    assert "dspark: this target's layers cannot be captured [score.captured]: use auto or off" in out
    # On a device where it goes without saying, the score goes on.
    monkeypatch.setattr(captured_module, "asks", lambda cfg, captured: True)
    folder, out = scored(place)
    assert sum("no captured rounds: this target's layers cannot be captured" in row for row in out.splitlines()) == 1
    assert read(folder / "scorecard.json")["captured"] == []


@pytest.mark.parametrize("value", ["yes", "True", ""])
def test_another_word_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"score.captured is .*; choose one of auto, on, off"):
        ScoreConfig(captured=value)


def test_a_score_without_captured_rounds_has_no_section() -> None:
    assert captured_markdown(ScorePlan({}, [], 0, {})) == ""
