"""Which tree a draft should propose: the target answers prompts, and what it went on with says which paths are worth
their place; whether any tree is worth what its rounds take; and whether it is when answers are sampled."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inference.drafters.feature import FeatureDrafter
from inference.graphed.decode import GraphedDecoder
from inference.graphed.written import num_copied
from inference.prescore.responses import fixed_response
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt, request_seed
from inference.trees import Continuations, Tree

_GREEDY = SamplingSettings()


def continuations(
    decoder: GraphedDecoder,
    drafter: FeatureDrafter,
    prompts: Sequence[ScorePrompt],
    *,
    depth: int,
    lookup: int,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
) -> Continuations:
    """What the target goes on with after every anchor of its greedy answers.

    Args:
        decoder: of the target, with any draft: what it answers is the target's own.
        drafter: whose ranks are wanted.
        prompts: on which the tree is chosen; never those it is measured on.
        depth: most tokens of a path.
        lookup: most tokens that a tree copies; 0 for none.
        max_new_tokens: per answer.
        stop_tokens: end an answer.
    """
    target, known = decoder.rounds.target.target, Continuations()
    request = Request(settings=_GREEDY, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    for prompt in prompts:
        answer = decoder.decode(prompt.tokens, request=request, seed=0).tokens
        response = fixed_response(
            target, prompt, answer, settings=_GREEDY, max_new_tokens=max_new_tokens, taps=tuple(drafter.taps)
        )
        copied = num_copied(response.tokens, response.first, count=lookup).tolist() if lookup else None
        known.add(drafter.continuation_ranks(response, depth=depth).tolist(), copied)
    return known


@dataclass(frozen=True)
class WeighedTree:
    """What rounds of a tree, or of a chain, are expected to give.

    Attributes:
        tree: what they propose.
        tau: tokens a round: greedy, on the answers that the trees were chosen on; sampled, of answers to their prompts.
        seconds: of a round.
    """

    tree: Tree
    tau: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tau / self.seconds

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"tree": self.tree.to_json(), "tau": self.tau, "seconds": self.seconds}

    @classmethod
    def from_json(cls, data: dict[str, Any], *, where: str) -> "WeighedTree":
        """Read what `to_json` wrote."""
        return cls(Tree.from_json(data["tree"], where=where), data["tau"], data["seconds"])


def weigh_trees(
    decoder: GraphedDecoder,
    known: Continuations,
    *,
    tokens: int,
    sizes: Sequence[int],
    depths: Sequence[int],
    lookup: int,
) -> list[WeighedTree]:
    """The chain, and after it the best tree of every size and depth, each with its tau and what its rounds take here.

    Args:
        decoder: of the target and the draft.
        known: what the target went on with, at least as deep as chain and trees, and so much of it copied.
        tokens: of the chain.
        sizes: drafted nodes of the trees; where fewer paths were seen, the same tree is weighed once.
        depths: most tokens of a path of a tree.
        lookup: tokens that every tree copies.
    """
    chain = Tree.chain(tokens)
    shapes = itertools.product(sorted(sizes), sorted(depths))
    trees = dict.fromkeys(known.best(size, depth=depth, lookup=lookup) for size, depth in shapes)
    proposed: list[tuple[Tree, int | Tree]] = [(chain, tokens), *((tree, tree) for tree in trees if tree != chain)]
    return [WeighedTree(tree, known.tau(tree), decoder.timed(asked, sampled=False).whole) for tree, asked in proposed]


def fastest_tree(weighed: Sequence[WeighedTree]) -> Tree | None:
    """The tree of the most tokens a second; None where that is the chain, which comes first."""
    best = max(weighed, key=lambda one: one.rate)
    return None if best is weighed[0] else best.tree


def weigh_sampled(
    decoder: GraphedDecoder,
    tree: Tree,
    prompts: Sequence[ScorePrompt],
    *,
    tokens: int,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
    name: str,
) -> list[WeighedTree]:
    """The chain, and after it the tree, each with its tau over sampled answers and what its rounds take here.

    Args:
        decoder: of the target and the draft.
        tree: that greedy rounds propose.
        prompts: that it was chosen on; never those it is measured on.
        tokens: of the chain.
        settings: of the answers, which are sampled.
        max_new_tokens: per answer.
        stop_tokens: end an answer.
        seed: of the run.
        name: of the draft.
    """
    request = Request(settings=settings, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    seeds = [request_seed(seed, prompt.id, settings.temperature, name, "tree") for prompt in prompts]

    def weighed(proposed: Tree | None) -> WeighedTree:
        own = decoder.of_block(tokens, proposed, tree_when_sampled=True)
        answers = [
            own.decode(prompt.tokens, request=request, seed=each) for prompt, each in zip(prompts, seeds, strict=True)
        ]
        tau = sum(len(answer.tokens) for answer in answers) / sum(answer.passes for answer in answers)
        took = own.timed(own.proposed(sampled=True), sampled=True).whole
        return WeighedTree(proposed or Tree.chain(tokens), tau, took)

    # The tree comes last, so that its rounds are those that are kept.
    return [weighed(None), weighed(tree)]
