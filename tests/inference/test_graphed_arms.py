"""Captured arms: which can be, that nothing is captured late, what their rounds cost, and the block that follows.

Without a GPU the same rounds run uncaptured.
"""

import itertools
from typing import Any

import pytest
import torch

from inference.attention import use_grouped_attention
from inference.block_length import choose_block
from inference.costs import RoundCosts
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.feature_networks import FeatureNetwork
from inference.graphed import decode as decode_module
from inference.graphed import timing
from inference.graphed.arms import can_be_captured, capacity_for, captured_decoder, longest_block
from inference.graphed.decode import GraphedDecoder, follows
from inference.graphed.rounds import Rounds
from inference.graphed.timing import RoundSeconds, costs_of, round_seconds
from inference.lean import use_lean_layers
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.precision import model_nbytes
from inference.prescore.ranking import prescore
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import Arm, ScorePrompt, score_prompt
from inference.tree_choice import fastest_tree, weigh_sampled, weigh_trees
from inference.trees import Continuations, Tree
from tests.inference.families import family_model
from tests.inference.test_feature_drafts import CONFIGS, network_for
from tests.inference.test_graphed import plainly, prompt
from tests.inference.test_prescore import drafter_of, respond

CONTEXT = 256
GREEDY = Request(settings=SamplingSettings(), max_new_tokens=20)
NONE: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return lean("llama", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def network(target: CausalModel) -> FeatureNetwork:
    return network_for(CONFIGS["eagle3"], target)


def lean(family: str, **changes: Any) -> CausalModel:
    """A tiny model whose layers run as captured rounds want them."""
    model = family_model(family, **changes)
    use_grouped_attention(model.model)
    use_lean_layers(model.model)
    return model


def captured(target: CausalModel, network: FeatureNetwork | None, *, tokens: int = CONTEXT) -> GraphedDecoder:
    drafter: Drafter = NoDrafter() if network is None else FeatureDrafter(network)
    return captured_decoder(target, drafter, block=longest_block(drafter), tokens=tokens)


# Which


def test_target_only_decoding_and_drafts_that_read_features_can_be_captured(network: FeatureNetwork) -> None:
    assert can_be_captured(NoDrafter()) and can_be_captured(FeatureDrafter(network))
    for kind in ("lookup", "pretrained", "student", "mixed", "mixed eagle3", "medusa"):
        assert not can_be_captured(drafter_of(kind)), kind
    assert (longest_block(NoDrafter()), longest_block(FeatureDrafter(network))) == (0, network.block)


def test_what_cannot_be_captured_is_refused(target: CausalModel) -> None:
    with pytest.raises(InputError, match="rounds of this draft cannot be captured"):
        captured_decoder(target, drafter_of("lookup"), block=2, tokens=64)
    with pytest.raises(InputError, match="this target's layers cannot be captured"):
        captured(lean("gpt_neox"), None)


def test_layers_that_see_a_window_are_refused_where_requests_outgrow_it() -> None:
    windowed = {
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
    }
    target = lean("qwen2", max_position_embeddings=CONTEXT, **windowed)
    with pytest.raises(InputError, match="layers see 100 of 128 positions, captured rounds all of them"):
        captured(target, None, tokens=101)
    assert captured(target, None, tokens=64).rounds.capacity == 64


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.9}, {"repetition_penalty": 1.1}])
def test_rounds_follow_temperatures_alone(setting: dict[str, Any]) -> None:
    assert follows(SamplingSettings()) and follows(SamplingSettings(temperature=0.7))
    assert not follows(SamplingSettings(temperature=1.0, **setting))


# Capacity


def test_capacity_is_what_the_longest_request_needs(target: CausalModel) -> None:
    assert capacity_for(target, 64, block=0) == 64
    assert capacity_for(target, 64, block=1) == 128
    # A block that is cut off at the context's end still needs its place.
    assert capacity_for(target, 10 * CONTEXT, block=3) == CONTEXT + 64


def test_answers_end_with_the_context_as_the_ordinary_decoders_do(target: CausalModel, network: FeatureNetwork) -> None:
    for draft in (None, network):
        tokens, request = prompt(CONTEXT - 9), Request(settings=SamplingSettings(), max_new_tokens=50)
        given = captured(target, draft).decode(tokens, request=request, seed=0)
        assert given.tokens == plainly(target, draft, tokens, request).tokens
        assert len(given.tokens) == 9


@pytest.mark.parametrize("length", [1025, 1150, 1200])
def test_the_last_piece_of_a_long_prompt_stays_inside(length: int) -> None:
    """1216 positions: after 1024 there is room for 192, less than the next power of two."""
    target = lean("llama", max_position_embeddings=1300)
    decoder = captured(target, None, tokens=1216)
    assert decoder.rounds.capacity == 1216
    request = Request(settings=SamplingSettings(), max_new_tokens=4)
    given = decoder.decode(prompt(length), request=request, seed=0)
    assert given.tokens == plainly(target, None, prompt(length), request).tokens


def test_capacity_has_room_for_a_tree(target: CausalModel, network: FeatureNetwork) -> None:
    drafter, tree = FeatureDrafter(network), Tree.of([(rank,) for rank in range(7)])
    without, wide = (captured_decoder(target, drafter, block=1, tokens=60, tree=each) for each in (None, tree))
    assert (without.rounds.capacity, wide.rounds.capacity, wide.tree) == (64, 128, tree)


# Prepared


@pytest.mark.parametrize("tokens", [100, CONTEXT])
def test_once_prepared_nothing_is_captured_within_an_answer(
    target: CausalModel, network: FeatureNetwork, tokens: int
) -> None:
    for draft in (None, network):
        decoder = captured(target, draft, tokens=tokens)
        longest = tokens - 12
        decoder.prepare(longest_prompt=longest, sampled=[False, True])
        there = decoder.rounds.programs.names
        for length, temperature in itertools.product((1, 2, 63, 64, 65, 66, longest - 1, longest), (0.0, 1.0)):
            request = Request(settings=SamplingSettings(temperature=temperature), max_new_tokens=12)
            decoder.decode(prompt(min(length, longest)), request=request, seed=0)
        assert decoder.rounds.programs.names == there


# Other lengths


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_a_shorter_block_writes_the_same_in_more_rounds(target: CausalModel, kind: str) -> None:
    network = network_for(CONFIGS[kind], target)
    longest = captured(target, network)
    assert longest.of_block(network.block) is longest
    one = longest.of_block(1)
    assert longest.of_block(1) is one and one.rounds.block == 1
    assert one.rounds.capacity == longest.rounds.capacity and one.rounds.target.target is target
    for seed in (3, 4):
        tokens = prompt(20, seed=seed)
        given = one.decode(tokens, request=GREEDY, seed=0)
        assert given.tokens == longest.decode(tokens, request=GREEDY, seed=0).tokens
        assert given.blocks == {1: given.passes}
    assert longest.of_block(2) is not one and longest.of_block(2).rounds.block == 2


# Costs


def fake_seconds(monkeypatch: pytest.MonkeyPatch, *, block: float, token: float, verify: float) -> list[int]:
    """Rounds that take made-up times: 1 target-only, then a line; returns the lengths that were timed."""
    asked: list[int] = []

    def seconds(rounds: Rounds, *, length: int, sampled: bool) -> RoundSeconds:
        asked.append(rounds.block)
        if not rounds.block:
            return RoundSeconds(1.0, 0.0, 1.0)
        draft = block + token * rounds.block
        return RoundSeconds(draft + verify * rounds.block + 1.25, draft, verify * rounds.block + 1.0)

    monkeypatch.setattr(decode_module, "round_seconds", seconds)
    return asked


def test_every_length_is_timed_once(
    target: CausalModel, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_seconds(monkeypatch, block=0.2, token=0.1, verify=0.0)
    decoder = captured(target, network)
    for _ in range(2):
        for block in range(network.block + 1):
            decoder.timed(block, sampled=False)
    assert asked == [*range(network.block + 1)]
    decoder.of_block(1).timed(1, sampled=False)
    assert len(asked) == network.block + 1, "shared with the decoders of other lengths"
    decoder.of_block(1).timed(1, sampled=True)
    assert asked[-1] == 1 and len(asked) == network.block + 2


def test_trees_are_weighed_against_the_chain_by_what_their_rounds_take(
    target: CausalModel, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Continuations()
    # Of four anchors: the second likeliest token, and after it the likeliest; nothing after the others.
    known.add([[1, 0], [-1, -1], [1, 0], [-1, -1]])
    timed: list[tuple[int, Tree | None]] = []

    def seconds(rounds: Rounds, *, length: int, sampled: bool) -> RoundSeconds:
        tree = None if rounds.plan is None else rounds.plan.tree
        timed.append((rounds.block, tree))
        assert not sampled
        return RoundSeconds(1.0, 0.5, 0.5) if tree is None else RoundSeconds(0.5 * len(tree.paths), 0.0, 0.0)

    monkeypatch.setattr(decode_module, "round_seconds", seconds)
    decoder = captured(target, network)
    weighed = weigh_trees(decoder, known, tokens=1, sizes=[2, 1, 64], depths=[2, 1], lookup=0)
    one, two = Tree.of([(1,)]), Tree.of([(1,), (1, 0)])
    # Tokens of four: in four rounds by the chain, in two by the node that was seen, and no more by the one below it.
    assert [(each.tree, each.tau, each.seconds) for each in weighed] == [
        (Tree.chain(1), 1.0, 1.0),
        (one, 2.0, 0.5),
        (two, 2.0, 1.0),
    ]
    assert timed == [(1, None), (0, one), (0, two)]
    assert fastest_tree(weighed) == one
    nothing = Continuations()
    nothing.add([[-1, -1]])
    alone = weigh_trees(decoder, nothing, tokens=1, sizes=[4], depths=[2], lookup=0)
    assert alone == weighed[:1], "that is the chain"
    # With what is copied it is another tree, whether or not any of it is right.
    copying = weigh_trees(decoder, nothing, tokens=1, sizes=[4, 8], depths=[1, 2], lookup=3)
    assert [(each.tree, each.tau) for each in copying] == [(Tree.chain(1), 1.0), (Tree.chain(1, lookup=3), 1.0)]
    assert copying[1].tree.to_json() == {"paths": [[0]], "lookup": 3}


@pytest.mark.parametrize("tree_seconds", [1e-3, 1e3])
def test_a_tree_is_weighed_against_the_chain_by_answers_when_sampled(
    target: CausalModel, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch, tree_seconds: float
) -> None:
    decoder, tree = captured(target, network), Tree.of([(0,), (1,), (0, 0)], lookup=2)
    timed: list[tuple[bool, bool]] = []

    def seconds(rounds: Rounds, *, length: int, sampled: bool) -> RoundSeconds:
        own = rounds.proposes_tree(sampled=sampled)
        timed.append((own, sampled))
        return RoundSeconds(tree_seconds, 0.0, 0.0) if own else RoundSeconds(1.0, 0.0, 0.0)

    monkeypatch.setattr(decode_module, "round_seconds", seconds)
    settings = SamplingSettings(temperature=0.8)
    asked: list[tuple[float, int]] = []
    decode = GraphedDecoder.decode

    def decoded(self: GraphedDecoder, tokens: torch.Tensor, *, request: Request, seed: int) -> Any:
        asked.append((request.settings.temperature, seed))
        return decode(self, tokens, request=request, seed=seed)

    monkeypatch.setattr(GraphedDecoder, "decode", decoded)
    prompts = [ScorePrompt(str(length), "chat", prompt(length, seed=length)) for length in (9, 20)]
    weighed = weigh_sampled(
        decoder, tree, prompts, tokens=1, settings=settings, max_new_tokens=16, stop_tokens=NONE, seed=3, name="eagle3"
    )
    # The same prompts by the same seeds, each its own.
    assert {temperature for temperature, _ in asked} == {0.8} and len(asked) == 4
    assert asked[:2] == asked[2:] and asked[0] != asked[1]
    monkeypatch.undo()
    request = Request(settings=settings, max_new_tokens=16)
    rounds = [
        Rounds(target, network, block=1, capacity=decoder.rounds.capacity, tree=each, tree_when_sampled=True)
        for each in (None, tree)
    ]
    for one, own in zip(weighed, rounds, strict=True):
        answers = [
            GraphedDecoder(own).decode(p.tokens, request=request, seed=seed)
            for p, (_, seed) in zip(prompts, asked, strict=False)
        ]
        assert one.tau == sum(len(a.tokens) for a in answers) / sum(a.passes for a in answers)
    assert [(one.tree, one.seconds) for one in weighed] == [(Tree.chain(1), 1.0), (tree, tree_seconds)]
    assert timed == [(False, True), (True, True)]
    assert fastest_tree(weighed) == (tree if tree_seconds < 1.0 else None)
    # The rounds that are asked for next are there already.
    kept = decoder.of_block(1, tree, tree_when_sampled=True)
    assert "tree" in {name[0] for name in kept.rounds.programs.names}


def test_a_decoder_proposes_the_tree_when_sampled_where_it_is_asked_to(
    target: CausalModel, network: FeatureNetwork
) -> None:
    longest, tree = captured(target, network), Tree.of([(0,), (1,)])
    greedy = longest.of_block(1, tree)
    assert (greedy.proposed(sampled=False), greedy.proposed(sampled=True)) == (tree, 1)
    both = longest.of_block(1, tree, tree_when_sampled=True)
    assert both is not greedy and both is longest.of_block(1, tree, tree_when_sampled=True)
    assert (both.proposed(sampled=False), both.proposed(sampled=True)) == (tree, tree)
    # Without a tree there is nothing to propose in place of the chain.
    assert longest.of_block(network.block, tree_when_sampled=True) is longest


@pytest.mark.parametrize("sampled", [False, True])
def test_a_tree_is_timed_by_rounds_that_propose_it(
    target: CausalModel, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    tree, seen = Tree.of([(0,), (1,)], lookup=3), []

    def seconds(rounds: Rounds, *, length: int, sampled: bool) -> RoundSeconds:
        timing.round_seconds(rounds, length=length, sampled=sampled)
        seen.append({name[0] for name in rounds.programs.names})
        return RoundSeconds(1.0, 0.0, 1.0)

    monkeypatch.setattr(decode_module, "round_seconds", seconds)
    captured(target, network).timed(tree, sampled=sampled)
    assert seen == [{"tree"}]


def test_rounds_are_timed_whole_and_by_part(target: CausalModel, network: FeatureNetwork) -> None:
    for sampled in (False, True):
        both = round_seconds(captured(target, network).rounds, length=40, sampled=sampled)
        assert min(both.whole, both.draft, both.verify) > 0.0
        assert both.draft < both.whole and both.verify < both.whole
    alone = round_seconds(captured(target, None).rounds, length=40, sampled=False)
    assert (alone.draft, alone.verify) == (0.0, alone.whole)


def test_a_timed_round_finds_the_same_context_each_time(target: CausalModel, network: FeatureNetwork) -> None:
    rounds = captured(target, network).rounds
    work = timing.steady_round(rounds, length=40, sampled=False)
    assert rounds.context is not None
    for _ in range(20):
        work()
        assert int(rounds.lengths) == int(rounds.context.held)
        assert 41 <= int(rounds.lengths) <= 41 + network.block, "it does not grow"


def test_costs_give_back_what_whole_rounds_took() -> None:
    # Drafting 0.3 + 0.2 n; all else of a round of two is dearer than the line would have it.
    timed = {
        0: RoundSeconds(1.0, 0.0, 1.0),
        1: RoundSeconds(1.9, 0.5, 1.2),
        2: RoundSeconds(2.9, 0.7, 1.3),
        3: RoundSeconds(2.6, 0.9, 1.4),
    }
    costs = costs_of(timed)
    assert [costs.seconds(n) for n in range(4)] == pytest.approx([1.0, 1.9, 2.9, 2.6])
    assert (costs.block_seconds, costs.token_seconds) == pytest.approx((0.3, 0.2))
    assert costs_of({0: timed[0]}) == RoundCosts({1: 1.0})
    assert [costs_of({n: timed[n] for n in (0, 1)}).seconds(n) for n in (0, 1)] == pytest.approx([1.0, 1.9])


def test_seconds_of_an_answer_are_split_as_its_rounds_were_timed(
    target: CausalModel, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = captured(target, network)
    whole = decoder.decode(prompt(20), request=GREEDY, seed=0).seconds
    assert whole["verify"] > 0.0 and whole["draft"] == whole["other"] == 0.0
    decoder._timed[network.block, False] = RoundSeconds(4e-6, 1e-6, 2e-6)
    given = decoder.decode(prompt(20), request=GREEDY, seed=0)
    assert given.seconds["draft"] == pytest.approx(1e-6 * given.passes)
    assert given.seconds["verify"] == pytest.approx(2e-6 * given.passes)
    assert given.seconds["other"] > 0.0, "the rest of what the request took"
    decoder._timed[network.block, False] = RoundSeconds(4.0, 1.0, 2.0)
    slow = decoder.decode(prompt(20), request=GREEDY, seed=0).seconds
    assert slow["draft"] > 0.0 and slow["verify"] == slow["other"] == 0.0, "never more than the request took"


# Choices


def block_chosen(target: CausalModel, network: FeatureNetwork, costs: RoundCosts) -> Any:
    arm = Arm("draft", target, FeatureDrafter(network), FixedLookahead(0), captured(target, network))
    return choose_block(
        arm,
        [ScorePrompt(f"v{i}", "chat", prompt(9, seed=i)) for i in range(3)],
        longest=network.block,
        settings=[SamplingSettings(), SamplingSettings(temperature=1.0)],
        max_new_tokens=24,
        stop_tokens=NONE,
        pass_seconds=lambda width: 1 / 0,
        seed=0,
        costs=costs,
    )


def test_the_block_is_chosen_by_what_captured_rounds_cost(target: CausalModel, network: FeatureNetwork) -> None:
    flat = block_chosen(target, network, RoundCosts({1: 1.0, 1 + network.block: 1.0}))
    assert flat.tokens == network.block, "where more tokens cost nothing, none is left out"
    dear = block_chosen(target, network, RoundCosts({1: 1.0, 1 + network.block: 1.0}, 0.5, 40.0))
    assert dear.tokens == 1 and (dear.block_seconds, dear.draft_seconds) == (0.5, 40.0)
    assert flat.conditional == dear.conditional and flat.siblings == []
    # E[tokens] / seconds, of the chain's acceptances: (1 + a) / (1 + 0.5 + 40).
    assert dear.expected[0] == pytest.approx((1.0 + dear.conditional[0]) / 41.5)


def test_the_pre_score_takes_what_captured_rounds_cost() -> None:
    drafter, response = drafter_of("eagle3"), respond()
    costs = RoundCosts({1: 1.0, 2: 3.0, 3: 2.0, 4: 9.0, 5: 9.0})
    found = prescore(
        drafter,
        [response],
        lengths=range(1, 5),
        passes={1: 1e9},
        baseline_seconds=0.5,
        device=torch.device("cpu"),
        captured=costs,
    )
    assert found is not None and found.tokens == 2
    # Every round takes 2 s, that of the last tokens of the budget too; a target-only round half a second.
    assert found.speedup == pytest.approx(0.5 * found.taus["0"] / 2.0)


# Records


def test_captured_arms_leave_the_records_of_uncaptured_ones(target: CausalModel, network: FeatureNetwork) -> None:
    plain = [
        Arm("none", target, NoDrafter(), FixedLookahead(0)),
        Arm("draft", target, FeatureDrafter(network), FixedLookahead(network.block)),
    ]
    graphed = [
        Arm(arm.name, target, arm.drafter, arm.lookahead, captured(target, draft))
        for arm, draft in zip(plain, (None, network), strict=True)
    ]
    asked = ScorePrompt("p", "chat", prompt(20))
    records = [
        score_prompt(arms, asked, settings=SamplingSettings(), max_new_tokens=20, stop_tokens=NONE, seed=0)
        for arms in (plain, graphed)
    ]
    assert [r.digest for r in records[0]] == [r.digest for r in records[1]]
    assert all(r.mismatch is None for arms in records for r in arms)
    baseline, draft = records[1]
    assert baseline.draft_bytes == 0 and draft.draft_bytes > model_nbytes(network)
    assert (baseline.blocks, draft.blocks) == ({"0": 20}, {str(network.block): draft.passes})
