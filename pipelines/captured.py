"""Captured rounds in a score: which arms are decoded by them, prepared before anything is timed, what they take, and
which trees they propose.

On a GPU a round run kernel by kernel is nearly all launches (docs/gpu.md), and speeds measured like that say little.
The baseline is captured whenever anything is: a draft is compared with the fastest target-only decoding there is.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference.block_length import BlockChoice
from inference.costs import RoundCosts
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.errors import InputError
from inference.graphed.arms import can_be_captured, capacity_for, decoder_of_capacity, longest_block
from inference.graphed.asked import CAPTURED_AUTO, CAPTURED_ON
from inference.graphed.decode import GraphedDecoder, follows
from inference.graphed.timing import costs_of
from inference.scoring import Arm, ScorePrompt
from inference.tree_choice import WeighedTree, continuations, fastest_tree, weigh_sampled, weigh_trees
from inference.trees import Tree
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.report import markdown_table

if TYPE_CHECKING:
    from pipelines.score_plan import ScorePlan

logger = logging.getLogger(__name__)

FIXED = "fixed"
"""The policy of captured rounds."""


def captures(cfg: RunConfig) -> bool:
    """Whether a score of this configuration asks for captured rounds and can follow it with them, targets apart."""
    return asks(cfg, cfg.score.captured) and not obstacle(cfg, cfg.score.temperatures)


def captured_arms(context: RunContext, arms: dict[str, Arm]) -> dict[str, Arm]:
    """The arms, those that can be captured with a decoder of the longest block they may get; one line says which.

    Args:
        context: of the run.
        arms: all of them, the baseline among them.

    Raises:
        InputError: `score.captured=on` with a target that cannot be captured.
    """
    cfg = context.cfg
    if not asks(cfg, cfg.score.captured):
        return arms
    if reason := obstacle(cfg, cfg.score.temperatures):
        logger.info("no captured rounds: %s", reason)
        return arms
    own = {name: arm for name, arm in arms.items() if can_be_captured(arm.drafter)}
    try:
        made = {name: dataclasses.replace(arm, captured=_decoder(cfg, arm)) for name, arm in own.items()}
    except InputError as error:
        if cfg.score.captured == CAPTURED_ON:
            raise InputError(error.what, where="score.captured", mend="use auto or off") from None
        logger.info("no captured rounds: %s", error.what)
        return arms
    others = [name for name in arms if name not in made]
    left = f"; kernel by kernel, as no drafts that read features: {', '.join(others)}" if others else ""
    logger.info("captured rounds: %s%s", ", ".join(made), left)
    return {name: made.get(name, arm) for name, arm in arms.items()}


def asks(cfg: RunConfig, captured: str) -> bool:
    """Whether a stage's `captured` asks for captured rounds where the target of this run is."""
    return captured == CAPTURED_ON or (captured == CAPTURED_AUTO and cfg.target.torch_device().type == "cuda")


def obstacle(cfg: RunConfig, temperatures: Sequence[float]) -> str:
    """Why nothing can be captured at these temperatures, whatever the target; empty where nothing is in the way."""
    if not all(follows(cfg.decode.settings(temperature)) for temperature in temperatures):
        return "decode.top_k, decode.top_p and decode.repetition_penalty are more than they follow"
    size = cfg.target.most_holders(cfg.paths.cache)
    return f"the target is spread over {size} processes" if size > 1 else ""


def _decoder(cfg: RunConfig, arm: Arm) -> GraphedDecoder:
    block = min(cfg.lookahead.tokens or cfg.lookahead.longest_auto, longest_block(arm.drafter))
    tokens = cfg.score.max_prompt_tokens + cfg.decode.max_new_tokens
    # With room for the largest tree that may be chosen.
    trees = [size + cfg.lookahead.tree_lookup for size in _tree_sizes(cfg, arm.drafter)]
    capacity = capacity_for(arm.target, tokens, block=max([block, *trees]))
    return decoder_of_capacity(arm.target, arm.drafter, block=block, capacity=capacity)


def _tree_sizes(cfg: RunConfig, drafter: Drafter) -> list[int]:
    """Sizes of the trees that a captured draft may be given, in drafted tokens; none where no request is greedy."""
    return cfg.lookahead.trees if isinstance(drafter, FeatureDrafter) and 0.0 in cfg.score.temperatures else []


def with_tree(
    context: RunContext, arm: Arm, choice: BlockChoice, prompts: Sequence[ScorePrompt], stops: frozenset[int]
) -> BlockChoice:
    """The choice of a captured arm with the tree that its greedy rounds propose, if one is expected to be faster than
    the chain, and whether sampled ones propose it too; one line each says which. Of all other arms the choice as it is.

    Args:
        context: of the run.
        arm: with a decoder of its longest block.
        choice: of the chain.
        prompts: validation prompts, never held-out ones.
        stops: tokens that end an answer.
    """
    cfg, drafter = context.cfg, arm.drafter
    sizes = _tree_sizes(cfg, drafter)
    if arm.captured is None or not sizes or not isinstance(drafter, FeatureDrafter):
        return choice
    depths = sorted({min(depth, drafter.network.deepest) for depth in cfg.lookahead.tree_depths})
    lookup = cfg.lookahead.tree_lookup
    known = continuations(
        arm.captured,
        drafter,
        prompts,
        depth=max(*depths, choice.tokens),
        lookup=lookup,
        max_new_tokens=cfg.decode.max_new_tokens,
        stop_tokens=stops,
    )
    weighed = weigh_trees(arm.captured, known, tokens=choice.tokens, sizes=sizes, depths=depths, lookup=lookup)
    tree, chain = fastest_tree(weighed), weighed[0]
    best = max(weighed[1:], key=lambda one: one.rate, default=chain)
    logger.info(
        "%s: greedy rounds propose %s; the best tree has %d tokens, drafted %d deep and %d copied: tau %.2f expected, "
        "%.2f times as fast as the chain of %d (tau %.2f)",
        arm.name,
        "the chain" if tree is None else "the tree",
        best.tree.size,
        best.tree.drafted_depth,
        best.tree.lookup,
        best.tau,
        best.rate / chain.rate,
        choice.tokens,
        chain.tau,
    )
    choice = dataclasses.replace(choice, tree=tree, weighed=weighed)
    return choice if tree is None else _with_sampled(context, arm.name, arm.captured, choice, tree, prompts, stops)


def _with_sampled(
    context: RunContext,
    name: str,
    decoder: GraphedDecoder,
    choice: BlockChoice,
    tree: Tree,
    prompts: Sequence[ScorePrompt],
    stops: frozenset[int],
) -> BlockChoice:
    """The choice with whether sampled rounds propose its tree: where it is faster than the chain at the score's highest
    temperature."""
    cfg = context.cfg
    temperature = max(cfg.score.temperatures)
    # One token at every depth is what a chain proposes, of which more stands by rejection than by noise that is shared.
    if temperature == 0.0 or tree.size == tree.depth:
        return choice
    weighed = weigh_sampled(
        decoder,
        tree,
        prompts,
        tokens=choice.tokens,
        settings=cfg.decode.settings(temperature),
        max_new_tokens=cfg.decode.max_new_tokens,
        stop_tokens=stops,
        seed=cfg.seed,
        name=name,
    )
    chain, best = weighed
    when_sampled = fastest_tree(weighed) is not None
    logger.info(
        "%s: sampled rounds propose %s; at temperature %g the tree of %d has tau %.2f and is %.2f times as fast as the "
        "chain of %d (tau %.2f)",
        name,
        "the tree" if when_sampled else "the chain",
        temperature,
        tree.size,
        best.tau,
        best.rate / chain.rate,
        choice.tokens,
        chain.tau,
    )
    return dataclasses.replace(choice, tree_when_sampled=when_sampled, weighed_sampled=weighed)


def prepared(
    context: RunContext, arm: Arm, tokens: int, tree: Tree | None = None, *, tree_when_sampled: bool = False
) -> GraphedDecoder | None:
    """The decoder of a captured arm with blocks of `tokens` tokens or what it has, and in greedy rounds, or in all, a
    tree as far as it can propose it, all of it captured; None for an arm that is not captured. Asked for the same
    again, it is the same."""
    if arm.captured is None:
        return None
    cfg = context.cfg
    if tree is not None and isinstance(arm.drafter, FeatureDrafter):
        tree = arm.drafter.network.fitting_tree(tree)
    block = min(tokens, arm.captured.rounds.block)
    decoder = arm.captured.of_block(block, tree, tree_when_sampled=tree_when_sampled)
    longest = min(cfg.score.max_prompt_tokens, arm.target.context_limit - 1)
    decoder.prepare(longest_prompt=longest, sampled={t > 0.0 for t in cfg.score.temperatures})
    return decoder


def by_chains(context: RunContext, arm: Arm, *, temperature: float) -> Arm | None:
    """The arm with chains in place of the tree that its rounds propose at this temperature; None where they propose
    none.

    Args:
        context: of the run.
        arm: as it is scored.
        temperature: of requests.
    """
    if arm.captured is None or not arm.captured.rounds.proposes_tree(sampled=temperature > 0.0):
        return None
    return dataclasses.replace(arm, captured=prepared(context, arm, arm.captured.rounds.block))


def captured_costs(context: RunContext, arm: Arm) -> RoundCosts | None:
    """What captured rounds of an arm take at every block length, and target-only ones of its target, at the score's
    first temperature; None for an arm that is not captured. Timed once."""
    if arm.captured is None:
        return None
    sampled = context.cfg.score.temperatures[0] > 0.0
    decoder = arm.captured
    return costs_of({block: decoder.timed(block, sampled=sampled) for block in range(decoder.rounds.block + 1)})


def captured_markdown(plan: "ScorePlan") -> str:
    """What captured rounds took, as a section of the scorecard; empty where nothing was captured.

    Args:
        plan: of the score.
    """
    if not plan.captured:
        return ""
    costs = {name: RoundCosts.from_json(known, where="score plan") for name, known in plan.captured.items()}
    longest = max(len(known.passes) for known in costs.values()) - 1
    rows = []
    for name, known in costs.items():
        took = [f"{1e3 * known.seconds(block):.2f}" for block in range(len(known.passes))]
        shape = plan.blocks[name].shape if name in plan.blocks else "-"
        rows.append([name, shape, *took, *("-" for _ in range(longest + 1 - len(took)))])
    header = ["draft", "block", "target-only", *(str(block) for block in range(1, longest + 1))]
    return (
        "## Captured rounds\n\nThese were decoded by captured rounds, which propose a fixed number of tokens, without "
        "siblings. Milliseconds of a round by tokens proposed, from replays; the block length was chosen by them. In "
        "the seconds by part above, their drafting and verifying are from replays of each part alone, and `other` is "
        "the rest of each request.\n\n" + markdown_table(header, rows) + _trees_markdown(plan)
    )


def _trees_markdown(plan: "ScorePlan") -> str:
    """The trees that were weighed; empty where none were."""
    rows = []
    for name, choice in plan.blocks.items():
        rows += _weighed_rows(name, "greedy", choice.weighed, choice.tree)
        sampled = choice.tree if choice.tree_when_sampled else None
        rows += _weighed_rows(name, "sampled", choice.weighed_sampled, sampled)
    if not rows:
        return ""
    header = ["draft", "rounds", "proposed", "drafted deep", "copied", "expected tau", "ms a round"]
    return (
        "\nGreedy rounds propose the tree that was chosen, and sampled ones where it was chosen for them too, else the "
        "chain. What is copied from the text is a branch of its own beside the drafted ones. Trees are made and "
        "weighed on validation prompts, for sampled rounds by answers at the highest temperature.\n\n"
        + markdown_table([*header, "times the chain", "chosen"], rows)
    )


def _weighed_rows(name: str, rounds: str, weighed: Sequence[WeighedTree], tree: Tree | None) -> list[list[str]]:
    """What a draft's greedy or sampled rounds may propose, the chain first, of which they propose the tree if any."""
    return [
        [
            name,
            rounds,
            f"{'chain' if one is weighed[0] else 'tree'} of {one.tree.size}",
            str(one.tree.drafted_depth),
            str(one.tree.lookup),
            f"{one.tau:.2f}",
            f"{1e3 * one.seconds:.2f}",
            f"{one.rate / weighed[0].rate:.2f}",
            "yes" if one.tree == (tree or weighed[0].tree) else "no",
        ]
        for one in weighed
    ]
