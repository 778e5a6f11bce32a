"""Trees of proposed tokens, drafted and copied: greedy rounds with any tree emit the target's own tokens, and the tree
that is chosen is worth what the choice says."""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from inference.drafters.feature import FeatureDrafter
from inference.errors import InputError
from inference.feature_networks import FeatureNetwork
from inference.graphed import rounds as rounds_module
from inference.graphed.acceptance import accept_tree
from inference.graphed.decode import GraphedDecoder
from inference.graphed.rounds import Rounds
from inference.graphed.written import num_copied
from inference.lookahead import RecordingLookahead
from inference.model import CausalModel
from inference.prescore.responses import fixed_response
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt
from inference.trees import Continuations, Level, Tree, TreePlan
from tests.inference.families import VOCAB, lean_model
from tests.inference.test_feature_drafts import CONFIGS, REDUCED, network_for
from tests.inference.test_graphed import first_tokens, misfit, plainly, prompt, target_law

KINDS = ("dflash", "dspark", "dspark-gated", "dspark-rnn", "eagle3")
BUSHY = Tree.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3), (1, 0, 0)])
TREES = {
    "chain": Tree.chain(3),
    "bushy": BUSHY,
    # Nodes that are likeliest only after one that is not, and leaves between nodes with children.
    "crooked": Tree.of([(1,), (3,), (3, 2), (3, 4), (3, 2, 0), (3, 4, 1)]),
    "one": Tree.chain(1),
    "flat": Tree.of([(0,), (1,), (4,)]),
    # What is copied is longer than the paths, as long, and shorter.
    "copying": Tree.of(BUSHY.paths, lookup=5),
    "copying-much": Tree.chain(1, lookup=12),
    "copying-alike": Tree.of([(1,), (0,), (0, 0)], lookup=2),
    "copying-one": Tree.of([(1,), (3,), (3, 2), (3, 4), (3, 2, 0), (3, 4, 1)], lookup=1),
}
COPYING = TREES["copying"]
GREEDY = Request(settings=SamplingSettings(), max_new_tokens=24)


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return lean_model("llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def repeating() -> CausalModel:
    """A target that mostly goes by its last token, and so says much again."""
    model = lean_model("llama", max_position_embeddings=256)
    with torch.no_grad():
        for layer in model.model.base_model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
    return model


# The tree itself


def test_a_tree_is_its_paths() -> None:
    assert BUSHY.size == 9 and BUSHY.depth == 3 and BUSHY.most_children == 4
    assert BUSHY.parents == [0, 0, 0, 1, 1, 2, 4, 4, 6]
    assert Tree.chain(2).paths == ((0,), (0, 0))
    assert BUSHY.within(depth=1, children=9) == Tree.of([(0,), (1,), (2,)])
    assert BUSHY.within(depth=9, children=1) == Tree.chain(3)
    assert BUSHY.within(depth=9, children=9) == BUSHY and Tree.of([(1,)]).within(depth=1, children=1) is None


def test_what_is_copied_is_a_chain_behind_the_drafted_nodes() -> None:
    assert (COPYING.size, COPYING.depth, COPYING.drafted_depth, COPYING.most_children) == (14, 5, 3, 4)
    assert COPYING.parents == [*BUSHY.parents, 0, 10, 11, 12, 13] and COPYING != BUSHY
    assert TREES["copying-one"].parents[-1] == 0 and TREES["copying-one"].depth == 3
    assert COPYING.within(depth=1, children=9) == Tree.of([(0,), (1,), (2,)], lookup=5), "no draft bounds it"
    assert Tree.of([(1,)], lookup=5).within(depth=1, children=1) is None
    with pytest.raises(ValueError, match="copies -1 tokens"):
        Tree.chain(1, lookup=-1)


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_read_back_from_its_file(name: str) -> None:
    assert Tree.from_json(json.loads(json.dumps(TREES[name].to_json())), where="pair.json") == TREES[name]


@pytest.mark.parametrize("paths", [[], [(0, 0)], [()], [(-1,)], [(0,), (1, 0)]])
def test_what_is_no_tree_is_refused(paths: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError):
        Tree.of(paths)
    with pytest.raises(InputError, match="publish the pair again"):
        Tree.from_json({"paths": [list(path) for path in paths], "lookup": 0}, where="pair.json")


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        [[0]],  # as trees were written before anything was copied
        {"paths": [[0]]},
        {"lookup": 0},
        {"paths": [["x"]], "lookup": 0},
        {"paths": [3], "lookup": 0},
        {"paths": [[0]], "lookup": -1},
        {"paths": [[0]], "lookup": None},
    ],
)
def test_a_file_without_a_tree_is_refused(data: object) -> None:
    with pytest.raises(InputError, match="the tree is off"):
        Tree.from_json(data, where="pair.json")


@pytest.mark.parametrize("tree", [BUSHY, COPYING], ids=["drafted", "copying"])
def test_the_plan_knows_ways_and_levels(tree: Tree) -> None:
    plan = TreePlan(tree, torch.device("cpu"))
    rest = tree.depth - 3
    assert plan.ways.tolist()[9] == [0, 2, 6, 9] + [9] * rest and plan.ways.tolist()[3] == [0, 3, 3, 3] + [3] * rest
    assert plan.ways.tolist()[-1] == ([0, 10, 11, 12, 13, 14] if tree.lookup else [0, 2, 6, 9])
    assert plan.depths.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, *range(1, tree.lookup + 1)]
    assert [level.count for level in plan.levels] == [1, 2, 2] and plan.entries == 4
    # Of three tokens two have children, of which each has one that has.
    among = plan.levels[1].among
    assert among is not None and among.tolist() == [0, 1] and plan.levels[2].before is None
    # A token sees the context, its own way and nothing beyond.
    for node, way in enumerate(plan.ways.tolist()):
        seen = plan.seen[node].tolist()
        assert seen[0] and not seen[-1]
        assert {i for i, sees in enumerate(seen[1:-1]) if sees} == set(way)


# What stands


def walked(tree: Tree, ids: list[int], choices: list[int]) -> list[list[int]]:
    """The longest ways that stand, by looking: one where a node's children are all different."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents, start=1):
        children.setdefault(parent, []).append(node)
    ways, further = [[0]], [[0]]
    while further:
        ways = further
        further = [[*way, node] for way in ways for node in children.get(way[-1], []) if ids[node] == choices[way[-1]]]
    return ways


@pytest.mark.parametrize("name", TREES)
def test_the_path_that_stands_is_the_targets_own(name: str) -> None:
    tree = TREES[name]
    plan = TreePlan(tree, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    rows = 2000
    ids = torch.zeros(rows, tree.size + 1, dtype=torch.long)
    # Children that are drafted are all different, of a small vocabulary so that much stands.
    drafted = len(tree.paths)
    for row in range(rows):
        for node in range(drafted + 1):
            children = [i for i, parent in enumerate(tree.parents[:drafted], start=1) if parent == node]
            ids[row, children] = torch.randperm(5, generator=generator)[: len(children)]
    choices = torch.randint(5, ids.shape, generator=generator)
    # Most of what is copied is right, and then what is drafted may be the same.
    right = torch.rand(rows, tree.lookup, generator=generator) < 0.8
    ids[:, drafted + 1 :] = torch.where(right, choices[:, tree.parents[drafted:]], ids[:, drafted + 1 :])
    emitted, stood, ways = accept_tree(ids, choices, plan)
    seen, doubled = set(), 0
    for row in range(rows):
        longest = walked(tree, ids[row].tolist(), choices[row].tolist())
        way = ways[row, : int(stood[row]) + 1].tolist()
        assert way in longest
        assert emitted[row, : len(way)].tolist() == [int(choices[row, node]) for node in way]
        seen |= {way[-1] for way in longest}
        doubled += len(longest) > 1
    assert seen == set(range(tree.size + 1)), "every node was the last that stands"
    assert (doubled > 0) == (tree.lookup > 0)


def first_child(ids: torch.Tensor, choices: torch.Tensor, plan: TreePlan) -> tuple[torch.Tensor, ...]:
    """A mutant that follows the first child that stands, as though no two were the same."""
    ways = [[0] for _ in ids]
    for way, own, wanted in zip(ways, ids.tolist(), choices.tolist(), strict=True):
        parents = plan.parents.tolist()
        for node in range(1, len(parents)):
            if parents[node] == way[-1] and own[node] == wanted[way[-1]]:
                way.append(node)
    stood = torch.tensor([len(way) - 1 for way in ways])
    nodes = plan.ways[torch.tensor([way[-1] for way in ways])]
    return choices.gather(1, nodes), stood, nodes


def test_of_two_nodes_with_one_token_the_deeper_way_is_taken() -> None:
    tree = Tree.of([(0,), (0, 0)], lookup=3)
    plan = TreePlan(tree, torch.device("cpu"))
    # The anchor's choice is 7, drafted and copied; after it come 8, 9 and 6.
    choices = torch.tensor([[7, 8, 9, 8, 9, 6]] * 3)
    ids = torch.tensor(
        [
            [0, 7, 5, 7, 8, 9],  # the copy goes on to the end, the draft stops after one
            [0, 7, 8, 7, 5, 5],  # the other way about
            [0, 7, 8, 7, 8, 5],  # both to the same depth
        ]
    )
    emitted, stood, ways = accept_tree(ids, choices, plan)
    assert stood.tolist() == [3, 2, 2]
    assert emitted[0].tolist() == [7, 8, 9, 6] and ways[0].tolist() == [0, 3, 4, 5]
    assert emitted[1, :3].tolist() == emitted[2, :3].tolist() == [7, 8, 9] and ways[1, :3].tolist() == [0, 1, 2]
    assert first_child(ids, choices, plan)[1].tolist() == [1, 2, 2]


def test_every_case_of_a_small_tree() -> None:
    """All proposals and all choices over three tokens, enumerated."""
    tree = Tree.of([(0,), (1,), (0, 0)])
    plan, tokens = TreePlan(tree, torch.device("cpu")), range(3)
    ids = [(0, one, other, below) for one in tokens for other in tokens for below in tokens if one != other]
    cases = [(own, choices) for own in ids for choices in itertools.product(tokens, repeat=4)]
    emitted, stood, ways = accept_tree(
        torch.tensor([list(own) for own, _ in cases]), torch.tensor([list(choices) for _, choices in cases]), plan
    )
    for row, (own, choices) in enumerate(cases):
        (way,) = walked(tree, list(own), list(choices))
        count = int(stood[row])
        assert ways[row, : count + 1].tolist() == way
        assert emitted[row, : count + 1].tolist() == [choices[node] for node in way]


# Rounds


@pytest.fixture
def knowing(target: CausalModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets drafts lean towards what follows a token in the target's answers, so that trees stand in part."""
    answers = [plainly(target, None, prompt(n, seed=n), GREEDY).tokens for n in (2, 17, 70)]
    lean = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    for before, after in itertools.chain(*(itertools.pairwise(answer) for answer in answers)):
        lean[before, after] += 6.0
        # And as much towards others, so that the right one is not always the likeliest.
        lean[before, torch.randint(VOCAB, (2,), generator=generator)] += 6.5

    def know(network: FeatureNetwork) -> FeatureNetwork:
        ids = slice(None) if network.vocabulary is None else network.vocabulary
        branch = network.branch

        def leaning(block: Any, level: Level, previous: torch.Tensor) -> torch.Tensor:
            return branch(block, level, previous) + lean[:, ids][previous]

        monkeypatch.setattr(network, "branch", leaning)
        return network

    yield know


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rounds_with_a_tree_emit_the_targets_own_tokens(
    target: CausalModel, knowing: Any, kind: str, reduced: bool, tree: str
) -> None:
    network = knowing(network_for(CONFIGS[kind], target, REDUCED if reduced else None))
    decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256, tree=TREES[tree]))
    for length in (1, 2, 17, 70):
        tokens = prompt(length, seed=length)
        wanted = plainly(target, None, tokens, GREEDY).tokens
        assert decoder.decode(tokens, request=GREEDY, seed=0).tokens == wanted


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_a_tree_that_is_a_chain_takes_the_rounds_of_a_chain(target: CausalModel, kind: str) -> None:
    network = network_for(CONFIGS[kind], target)
    chain = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256))
    tree = GraphedDecoder(Rounds(target, network, block=0, capacity=256, tree=Tree.chain(network.block)))
    for length in (2, 17, 70):
        tokens = prompt(length, seed=length)
        one, other = (decoder.decode(tokens, request=GREEDY, seed=0) for decoder in (chain, tree))
        assert (one.tokens, one.passes, one.accepted) == (other.tokens, other.passes, other.accepted)


def test_joined_products_are_the_same(target: CausalModel, knowing: Any) -> None:
    """As on a GPU, where rounds join them."""
    network = knowing(network_for(CONFIGS["eagle3"], target))
    tokens, answers = prompt(17, seed=17), []
    for _ in range(2):
        decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256, tree=BUSHY))
        answers.append(decoder.decode(tokens, request=GREEDY, seed=0))
        before = {name: tensor.clone() for name, tensor in network.own_tensors().items()}
        network.join_weights()
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.own_tensors().items())
    assert (answers[0].tokens, answers[0].passes) == (answers[1].tokens, answers[1].passes)
    attention = network.layer.self_attn  # type: ignore[attr-defined]
    joint = attention._joint
    network.join_weights()
    assert joint is not None and attention._joint is joint, "what was captured goes on reading these"


def random_tree(seed: int) -> Tree:
    """Paths of up to three tokens, each of which comes with its beginnings, and up to nine copied tokens."""
    source = random.Random(seed)
    paths = {tuple(source.randrange(3) for _ in range(source.randint(1, 3))) for _ in range(source.randint(1, 6))}
    return Tree.of({path[:end] for path in paths for end in range(1, len(path) + 1)}, lookup=source.randint(0, 9))


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_greedy_rounds_with_any_tree_emit_the_targets_own_tokens(
    target: CausalModel, repeating: CausalModel, knowing: Any, seed: int, repeats: bool
) -> None:
    asked = repeating if repeats else target
    network = network_for(CONFIGS[("dspark", "eagle3")[seed % 2]], asked)
    network, tree = network if repeats else knowing(network), random_tree(seed)
    rounds = Rounds(asked, network, block=0, batch=3, capacity=256, tree=tree)
    # One token, several pieces of a prompt that goes round in circles, and one piece.
    prompts = [prompt(1, seed=seed), prompt(30, seed=seed).repeat(5), prompt(40, seed=seed)]
    answers: list[list[int]] = [[] for _ in prompts]
    rounds.begin_all(range(3), [tokens.tolist() for tokens in prompts])
    while min(len(answer) for answer in answers) < 24:
        rounds.round(shown=256, sampled=False)
        for answer, numbers in zip(answers, rounds.emitted.tolist(), strict=True):
            answer += numbers[: numbers[-1]]
    alone = GraphedDecoder(Rounds(asked, network, block=0, capacity=256, tree=tree))
    for tokens, answer in zip(prompts, answers, strict=True):
        wanted = plainly(asked, None, tokens, GREEDY).tokens
        assert answer[:24] == alone.decode(tokens, request=GREEDY, seed=0).tokens == wanted


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_what_is_copied_stands_where_an_answer_repeats_the_text(repeating: CausalModel, temperature: float) -> None:
    network = network_for(CONFIGS["eagle3"], repeating)
    request = Request(settings=SamplingSettings(temperature=temperature), max_new_tokens=60)
    tokens, passes = prompt(17, seed=17), []
    for tree in (BUSHY, COPYING):
        rounds = Rounds(repeating, network, block=0, capacity=256, tree=tree, tree_when_sampled=True)
        given = GraphedDecoder(rounds).decode(tokens, request=request, seed=0)
        if temperature == 0.0:
            assert given.tokens == plainly(repeating, None, tokens, request).tokens
        passes.append(given.passes)
    assert passes[1] < 0.9 * passes[0]


def test_a_request_finds_nothing_of_the_one_before_it(target: CausalModel) -> None:
    """What is copied for a prompt of one token is told by it alone."""
    network = network_for(CONFIGS["eagle3"], target)
    decoder = GraphedDecoder(Rounds(target, network, block=0, capacity=256, tree=COPYING))
    first = decoder.decode(prompt(1), request=GREEDY, seed=0)
    decoder.decode(torch.cat([prompt(1), torch.tensor(first.tokens)]), request=GREEDY, seed=0)
    again = decoder.decode(prompt(1), request=GREEDY, seed=0)
    assert (again.tokens, again.passes) == (first.tokens, first.passes)


def test_rounds_are_prepared_whatever_was_decoded_before(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    decoder = GraphedDecoder(Rounds(target, network, block=0, capacity=256, tree=COPYING))
    first = decoder.decode(prompt(150), request=GREEDY, seed=0)
    decoder.rounds.prepare(sampled=False)
    again = decoder.decode(prompt(150), request=GREEDY, seed=0)
    assert (again.tokens, again.passes) == (first.tokens, first.passes)


@pytest.mark.parametrize("tree", [BUSHY, COPYING], ids=["drafted", "copying"])
def test_requests_of_a_batch_do_not_touch_each_other(target: CausalModel, knowing: Any, tree: Tree) -> None:
    network = knowing(network_for(CONFIGS["eagle3"], target))
    rounds = Rounds(target, network, block=network.block, batch=3, capacity=256, tree=tree)
    prompts = [prompt(2, seed=2), prompt(70, seed=70), prompt(17, seed=17)]
    for row, tokens in enumerate(prompts):
        rounds.begin(row, tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    depths = set()
    for _ in range(8):
        rounds.round(shown=256, sampled=False)
        for row, numbers in enumerate(rounds.emitted.tolist()):
            answers[row] += numbers[: numbers[-1]]
            depths.add(numbers[-1])
    assert len(depths) > 2, "some rounds end early and some late"
    for tokens, answer in zip(prompts, answers, strict=True):
        request = Request(settings=SamplingSettings(), max_new_tokens=len(answer))
        assert answer == plainly(target, None, tokens, request).tokens


def test_what_is_kept_of_a_tree_lies_where_a_chain_leaves_it(target: CausalModel, knowing: Any) -> None:
    network = knowing(network_for(CONFIGS["eagle3"], target))
    tokens, kept = prompt(17, seed=17), []
    for tree in (None, BUSHY, COPYING):
        rounds = Rounds(target, network, block=network.block, capacity=256, tree=tree, keep_states=True)
        answer = GraphedDecoder(rounds).decode(tokens, request=GREEDY, seed=0).tokens
        assert rounds.target.states is not None
        kept.append(rounds.target.states[0, : tokens.shape[0] + len(answer) - 1].clone())
    torch.testing.assert_close(kept[0], kept[1])
    torch.testing.assert_close(kept[0], kept[2])


def wrong_ways(ids: torch.Tensor, choices: torch.Tensor, plan: TreePlan) -> tuple[torch.Tensor, ...]:
    """A mutant that keeps the keys of the first nodes instead of those that stand."""
    emitted, stood, ways = accept_tree(ids, choices, plan)
    return emitted, stood, torch.arange(ways.shape[1]).expand_as(ways)


def keeps_more(ids: torch.Tensor, choices: torch.Tensor, plan: TreePlan) -> tuple[torch.Tensor, ...]:
    """A mutant that lets the likeliest token stand whatever the target says."""
    emitted, stood, ways = accept_tree(ids, choices, plan)
    forced = stood == 0
    return (
        torch.where(forced[:, None], torch.cat([ids[:, 1:2], choices[:, 1:2], emitted[:, 2:]], 1), emitted),
        stood.clamp(min=1),
        torch.where(forced[:, None], plan.ways[1], ways),
    )


@pytest.mark.parametrize("tree", [BUSHY, COPYING], ids=["drafted", "copying"])
@pytest.mark.parametrize("mutant", [wrong_ways, keeps_more])
def test_mutants_leave_the_targets_tokens(
    target: CausalModel, knowing: Any, mutant: Any, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = knowing(network_for(CONFIGS["eagle3"], target))
    tokens = prompt(17, seed=17)
    wanted = plainly(target, None, tokens, GREEDY).tokens
    monkeypatch.setattr(rounds_module, "accept_tree", mutant)
    decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256, tree=tree))
    assert decoder.decode(tokens, request=GREEDY, seed=0).tokens != wanted


@pytest.mark.parametrize("tree", [BUSHY, COPYING], ids=["drafted", "copying"])
def test_a_mask_that_shows_siblings_leaves_the_targets_tokens(target: CausalModel, knowing: Any, tree: Tree) -> None:
    network = knowing(network_for(CONFIGS["eagle3"], target))
    tokens = prompt(17, seed=17)
    rounds = Rounds(target, network, block=network.block, capacity=256, tree=tree)
    assert rounds.plan is not None
    width = tree.size + 1
    rounds.plan.seen[:, 1:-1] = torch.ones(width, width, dtype=torch.bool).tril()
    wanted = plainly(target, None, tokens, GREEDY).tokens
    assert GraphedDecoder(rounds).decode(tokens, request=GREEDY, seed=0).tokens != wanted


def test_copied_tokens_that_see_the_drafted_ones_leave_the_targets_tokens(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    tokens, request = prompt(17, seed=17), Request(settings=SamplingSettings(), max_new_tokens=60)
    rounds = Rounds(target, network, block=network.block, capacity=256, tree=COPYING)
    assert rounds.plan is not None
    rounds.plan.seen[-COPYING.lookup :, 1 : 2 + len(COPYING.paths)] = True
    wanted = plainly(target, None, tokens, request).tokens
    assert GraphedDecoder(rounds).decode(tokens, request=request, seed=0).tokens != wanted


# Sampled, by noise that target and draft share


def replayed(target: CausalModel, rounds: Rounds, tokens: torch.Tensor, *, temperature: float, seed: int) -> list[int]:
    """How many tokens each of some rounds emitted, all of which are what the target draws by the round's noise."""
    assert rounds.noise is not None and rounds.plan is not None
    rounds.reset()
    rounds.begin(0, tokens)
    rounds.temperatures.fill_(temperature)
    generator, answer, counts = torch.Generator(tokens.device).manual_seed(seed), tokens, []
    for _ in range(8):
        rounds.noise.exponential_(generator=generator)
        rounds.round(shown=256, sampled=True)
        *emitted, count = rounds.emitted[0].tolist()
        for depth, token in enumerate(emitted[:count]):
            row = target.logits(answer, target.new_cache(), num_rows=1)[0].double() / temperature
            wanted = int((torch.log_softmax(row, -1) - rounds.noise[0, depth].log()).argmax())
            assert token == wanted
            answer = torch.cat([answer, answer.new_tensor([token])])
        counts.append(count)
    return counts


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampled_token_is_the_targets_draw_by_its_own_noise(
    target: CausalModel, knowing: Any, kind: str, reduced: bool, tree: str
) -> None:
    network = knowing(network_for(CONFIGS[kind], target, REDUCED if reduced else None))
    rounds = Rounds(target, network, block=network.block, capacity=256, tree=TREES[tree], tree_when_sampled=True)
    for length, temperature in ((2, 1.0), (17, 0.3)):
        replayed(target, rounds, prompt(length, seed=length), temperature=temperature, seed=length)


BROAD = Tree.of([(rank,) for rank in range(20)] + [(rank, other) for rank in range(6) for other in range(8)])


def test_much_of_a_sampled_tree_stands(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    rounds = Rounds(target, network, block=network.block, capacity=256, tree=BROAD, tree_when_sampled=True)
    counts = replayed(target, rounds, prompt(17), temperature=1.0, seed=1)
    assert sum(counts) > 1.5 * len(counts)


def shared_noise(rounds: Rounds, generator: torch.Generator) -> None:
    """What a sampled round of a tree draws by."""
    assert rounds.noise is not None
    rounds.noise.exponential_(generator=generator)


def noise_of_one_position(rounds: Rounds, generator: torch.Generator) -> None:
    """A mutant: all positions draw by the same numbers, so that their tokens hang together."""
    shared_noise(rounds, generator)
    assert rounds.noise is not None
    rounds.noise.copy_(rounds.noise[:, :1].expand_as(rounds.noise).clone())


@pytest.mark.parametrize(("kind", "lookup"), [("dspark", 0), ("eagle3", 0), ("eagle3", 2)])
def test_sampled_trees_follow_the_targets_law(target: CausalModel, kind: str, lookup: int) -> None:
    network = network_for(CONFIGS[kind], target)
    places, draws, temperature = 256, 16, 0.4
    tree = Tree(BROAD.paths, lookup)
    rounds = Rounds(target, network, block=0, batch=places, capacity=128, tree=tree, tree_when_sampled=True)
    law = target_law(target, temperature)
    assert misfit(first_tokens(rounds, places, temperature, draws, redraw=shared_noise), law) < 4.0
    assert misfit(first_tokens(rounds, places, temperature, draws, redraw=noise_of_one_position), law) > 8.0


def test_one_seed_gives_one_sampled_answer(target: CausalModel, knowing: Any) -> None:
    network = knowing(network_for(CONFIGS["eagle3"], target))
    made = [Rounds(target, network, block=0, capacity=256, tree=BUSHY, tree_when_sampled=True) for _ in range(2)]
    decoders = [GraphedDecoder(rounds, ahead=ahead) for ahead, rounds in enumerate(made)]
    request = Request(settings=SamplingSettings(temperature=0.7), max_new_tokens=24)
    answers = [d.decode(prompt(17), request=request, seed=seed).tokens for d in decoders for seed in (5, 6)]
    assert answers[0] == answers[2] and answers[1] == answers[3] and answers[0] != answers[1]
    # Greedy requests in between leave no trace, nor do truncations of the settings' own.
    decoders[0].decode(prompt(30), request=GREEDY, seed=0)
    assert decoders[0].decode(prompt(17), request=request, seed=5).tokens == answers[0]


def test_sampled_and_recorded_rounds_go_by_the_chain(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    rounds = Rounds(target, network, block=network.block, capacity=256, tree=BUSHY)
    decoder, chain = GraphedDecoder(rounds), GraphedDecoder(Rounds(target, network, block=network.block, capacity=256))
    request = Request(settings=SamplingSettings(temperature=0.7), max_new_tokens=16)
    one, other = (each.decode(prompt(20), request=request, seed=3) for each in (decoder, chain))
    assert one.tokens == other.tokens
    assert {name[0] for name in rounds.programs.names} == {"prompt", "round"}
    decoder.decode(prompt(20), request=GREEDY, seed=3)
    assert "tree" in {name[0] for name in rounds.programs.names}
    # Unless noise is asked for, and then not while recording, which is of chains.
    noisy = Rounds(target, network, block=network.block, capacity=256, tree=BUSHY, tree_when_sampled=True)
    decoder = GraphedDecoder(noisy)
    decoder.decode(prompt(20), request=request, seed=3)
    assert {name[0] for name in noisy.programs.names} == {"prompt", "tree"}
    recorded = decoder.decode(prompt(20), request=request, seed=3, recording=RecordingLookahead(network.block))
    assert recorded.tokens == one.tokens


def test_trees_that_a_draft_cannot_propose_are_refused(target: CausalModel) -> None:
    network = network_for(CONFIGS["dspark"], target, REDUCED)
    with pytest.raises(ValueError, match="goes on to"):
        Rounds(target, network, block=0, capacity=256, tree=Tree.chain(network.block + 1))
    with pytest.raises(ValueError, match="knows 7"):
        Rounds(target, network, block=0, capacity=256, tree=Tree.of([(7,)]))
    with pytest.raises(ValueError, match="without a draft"):
        Rounds(target, None, block=0, capacity=256, tree=BUSHY)


def test_eagle_goes_on_behind_its_block(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    deep = Tree.chain(network.block + 3)
    decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256, tree=deep))
    tokens = prompt(17, seed=17)
    assert decoder.decode(tokens, request=GREEDY, seed=0).tokens == plainly(target, None, tokens, GREEDY).tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("tree", [None, BUSHY, COPYING], ids=["chain", "drafted", "copying"])
def test_rounds_sent_ahead_change_nothing(
    target: CausalModel, knowing: Any, tree: Tree | None, temperature: float
) -> None:
    network = knowing(network_for(CONFIGS["eagle3"], target))
    settings = SamplingSettings(temperature=temperature)

    def decoders(capacity: int) -> list[GraphedDecoder]:
        made = [Rounds(target, network, block=network.block, capacity=capacity, tree=tree) for _ in range(3)]
        return [GraphedDecoder(rounds, ahead=ahead) for ahead, rounds in enumerate(made)]

    plain, *others = decoders(256)
    whole = plain.decode(prompt(17), request=Request(settings=settings, max_new_tokens=40), seed=3)
    stops = frozenset({whole.tokens[20]})
    for length, budget, stop in ((17, 40, frozenset()), (17, 40, stops), (17, 1, frozenset()), (70, 9, frozenset())):
        request = Request(settings=settings, max_new_tokens=budget, stop_tokens=stop)
        wanted = plain.decode(prompt(length), request=request, seed=3)
        for other in others:
            given = other.decode(prompt(length), request=request, seed=3)
            assert (given.tokens, given.passes, given.accepted) == (wanted.tokens, wanted.passes, wanted.accepted)
    # Up to the very end of the buffers.
    proposed = network.block if tree is None else tree.size
    filled = [
        d.decode(prompt(60), request=Request(settings=settings, max_new_tokens=99), seed=3) for d in decoders(128)
    ]
    assert filled[0].tokens == filled[1].tokens == filled[2].tokens
    assert len(filled[0].tokens) == 128 - 60 - proposed


# The choice


def test_the_most_frequent_paths_make_the_tree() -> None:
    known = Continuations(most_rank=4)
    known.add([[0, 1, 9], [1, 0, 0], [0, 1, -1], [-1, 0, 0], [0, 0, 0]])
    # Of the last anchors less is known: the answer ends there.
    assert known.best(3, depth=3) == Tree.of([(0,), (0, 1), (1,)])
    assert known.best(2, depth=1) == Tree.of([(0,), (1,)])
    assert known.best(99, depth=3).size < 9
    assert Continuations().best(4, depth=3) == Tree.chain(1)
    assert Continuations().best(4, depth=3, lookup=2) == Tree.chain(1, lookup=2)


def test_paths_count_where_the_draft_goes_further_than_what_is_copied() -> None:
    known = Continuations()
    known.add([[0, 0, 0], [1, 2, 0], [0, 1, -1], [3, -1, -1], [2, 2, 2]], [3, 1, 2, 1, 9])
    assert known.best(99, depth=3).size == 9
    # Of the five ways only the second is longer than what is copied, and of the first tokens alone none is.
    assert known.best(9, depth=3, lookup=3) == Tree.of([(1,), (1, 2), (1, 2, 0)], lookup=3)
    assert known.best(9, depth=1, lookup=3) == Tree.chain(1, lookup=3)
    # Where one token is copied, the first three are.
    assert known.best(3, depth=2, lookup=1) == Tree.of([(0,), (1,), (0, 0)], lookup=1)
    assert known.best(9, depth=2, lookup=1) == Tree.of([(0,), (0, 0), (0, 1), (1,), (1, 2)], lookup=1)


def test_the_longer_of_what_is_drafted_and_copied_counts() -> None:
    known = Continuations()
    known.add([[0, 0], [0, 1], [1, 0], [1, 1], [0, -1], [0, 0], [0, 0]], [2, 0, 0, 0, 0, 1, 3])
    # Seven tokens; a round that stops short of the end gives one more than stand.
    odd = [(1,), (1, 1)]
    for tree, emitted in (
        (Tree.chain(1), [2, 1, 1, 2, 1]),
        (Tree.chain(1, lookup=2), [3, 1, 2, 1]),
        (Tree.of(odd), [1, 1, 2, 1, 1, 1]),
        (Tree.of(odd, lookup=1), [2, 2, 1, 2]),
    ):
        assert sum(emitted) == 7 and known.tau(tree) == pytest.approx(7 / len(emitted))


@pytest.mark.parametrize("lookup", [0, 1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tau_of_a_choice_is_that_of_decoding(
    target: CausalModel, repeating: CausalModel, kind: str, lookup: int
) -> None:
    """With the same arithmetic on both sides: what a draft makes of an answer is what it made while decoding it."""
    asked = repeating if lookup else target
    network = network_for(CONFIGS[kind], asked)
    drafter, known = FeatureDrafter(network), Continuations()
    request = Request(settings=SamplingSettings(), max_new_tokens=40)
    lengths = (2, 5, 17, 40, 70)
    for length in lengths:
        tokens = prompt(length, seed=length)
        answer = plainly(asked, None, tokens, request).tokens
        response = fixed_response(
            asked,
            ScorePrompt(str(length), "code", tokens),
            answer,
            settings=SamplingSettings(),
            max_new_tokens=40,
            taps=tuple(network.taps),
        )
        copied = num_copied(response.tokens, response.first, count=lookup).tolist() if lookup else None
        known.add(drafter.continuation_ranks(response, depth=3).tolist(), copied)
    wide = [(rank,) for rank in range(16)] + [(rank, other) for rank in range(4) for other in range(9)]
    for tree in (Tree.of(wide, lookup=lookup), known.best(12, depth=3, lookup=lookup)):
        decoder = GraphedDecoder(Rounds(asked, network, block=0, capacity=256, tree=tree))
        passes = emitted = 0
        for length in lengths:
            given = decoder.decode(prompt(length, seed=length), request=request, seed=0)
            passes, emitted = passes + given.passes, emitted + len(given.tokens)
        assert known.tau(tree) == pytest.approx(emitted / passes)
        assert emitted > passes and (lookup == 0 or known.tau(tree) > known.tau(Tree(tree.paths)))
