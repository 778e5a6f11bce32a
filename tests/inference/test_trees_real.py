"""Losslessness of trees on the real target: greedy answers token for token, with a draft that is often right and with
one that hardly ever is."""

from pathlib import Path

import pytest

from inference.drafters.feature import FeatureDrafter
from inference.graphed.decode import GraphedDecoder
from inference.graphed.rounds import Rounds
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt
from inference.target import stop_tokens
from inference.tree_choice import continuations
from inference.trees import Tree
from tests.inference.real import DOMAINS, fp32_target, greedy_reference, prompts
from tests.inference.real_drafts import SEED, real_drafter

pytestmark = [pytest.mark.real, pytest.mark.slow]

TREE = Tree.of([(a,) for a in range(4)] + [(a, b) for a in range(3) for b in range(3)] + [(0, 0, a) for a in range(3)])
COPYING = Tree(TREE.paths, lookup=16)
TOKENS, PROMPTS = 48, 2
# A checkout may lack the seed.
CASES = ["dspark", "dflash", *(["seed"] if SEED.is_dir() else [])]


def decoder_of(kind: str, shared: Path, tree: Tree | None) -> GraphedDecoder:
    drafter = real_drafter(kind, shared)
    assert isinstance(drafter, FeatureDrafter)
    network = drafter.network
    return GraphedDecoder(Rounds(fp32_target(), network, block=network.block, capacity=512, tree=tree))


@pytest.mark.parametrize("tree", [TREE, COPYING], ids=["drafted", "copying"])
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("kind", CASES)
def test_greedy_answers_are_the_targets_own(kind: str, domain: str, tree: Tree, shared: Path) -> None:
    target = fp32_target()
    decoder = decoder_of(kind, shared, tree)
    request = Request(settings=SamplingSettings(), max_new_tokens=TOKENS, stop_tokens=stop_tokens(target))
    references = greedy_reference(domain, shared)
    passes = emitted = 0
    for prompt, reference in zip(prompts(domain)[:PROMPTS], references, strict=False):
        given = decoder.decode(prompt, request=request, seed=0)
        assert given.tokens == reference[:TOKENS]
        passes, emitted = passes + given.passes, emitted + len(given.tokens)
    if kind == "seed":
        assert emitted > 1.8 * passes, "much of a trained draft's trees stands"


@pytest.mark.skipif(not SEED.is_dir(), reason="a checkout without the seed")
@pytest.mark.parametrize("lookup", [0, 16])
def test_the_chosen_tree_takes_fewer_rounds_than_the_chain(lookup: int, shared: Path) -> None:
    target, drafter = fp32_target(), real_drafter("seed", shared)
    assert isinstance(drafter, FeatureDrafter)
    chain = decoder_of("seed", shared, None)
    questions = [ScorePrompt(str(i), "maths", prompt) for i, prompt in enumerate(prompts("maths")[2:5])]
    known = continuations(
        chain, drafter, questions, depth=6, lookup=lookup, max_new_tokens=TOKENS, stop_tokens=stop_tokens(target)
    )
    tree = known.best(16, depth=6, lookup=lookup)
    assert tree.size == 16 + lookup and known.tau(tree) > 1.1 * known.tau(Tree.chain(drafter.network.block))
    request = Request(settings=SamplingSettings(), max_new_tokens=TOKENS, stop_tokens=stop_tokens(target))
    passes = []
    for decoder in (chain, decoder_of("seed", shared, tree)):
        answers = [decoder.decode(question.tokens, request=request, seed=0) for question in questions]
        passes.append(sum(answer.passes for answer in answers))
        # What the choice expects is what decoding took, but for rounds cut by the end of an answer.
    expected = sum(len(answer.tokens) for answer in answers) / known.tau(tree)
    assert passes[1] < 0.95 * passes[0] and passes[1] == pytest.approx(expected, abs=2)
