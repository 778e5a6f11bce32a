"""What is fixed before the first held-out prompt is decoded: block lengths, trees, and how many prompts fit the time.

Chosen on validation prompts alone, written at once, and read back by a score that was interrupted.
"""

import dataclasses
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.prompts import rank
from inference.block_length import BlockChoice, choose_block
from inference.costs import RoundCosts
from inference.lookahead import Chances, Lookahead, Measured
from inference.lookahead.fixed import FixedLookahead
from inference.scoring import Arm, ScorePrompt, score_prompt
from inference.statistics import BASELINE
from pipelines.calibrate import calibrate
from pipelines.captured import FIXED, captured_costs, prepared, with_tree
from pipelines.context import RunContext
from pipelines.files import read_json, write_json

logger = logging.getLogger(__name__)

_BLOCK_TOKENS = 32


@dataclass(frozen=True)
class ScorePlan:
    """Fixed after the warm-up and before the first held-out prompt.

    Attributes:
        blocks: block length and tree, and how they were chosen, by draft.
        prompts: ids of the held-out prompts, in the order they are decoded.
        screen_at: number of prompts after which slow arms are dropped; 0 never.
        chances: what each draft's signals are worth, as JSON; see `inference.lookahead.Chances`.
        policies: kind of the policy each draft is decoded under; captured rounds propose a fixed number of tokens
            whatever the configured one is.
        captured: what captured rounds take, as JSON (`inference.costs.RoundCosts`), by arm that is decoded by them.
    """

    blocks: dict[str, BlockChoice]
    prompts: list[str]
    screen_at: int
    chances: dict[str, dict[str, Any]]
    policies: dict[str, str] = field(default_factory=dict)
    captured: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        blocks = {name: choice.to_json() for name, choice in self.blocks.items()}
        return {**asdict(dataclasses.replace(self, blocks={})), "blocks": blocks}

    def measured(self, context: RunContext) -> dict[str, Measured]:
        """What the policies start from, by draft; of a captured one all costs are those of captured rounds."""
        profile = context.plan.profile.passes[context.plan.block_precision]
        passes = {name: RoundCosts.from_json(costs, where="score plan").passes for name, costs in self.captured.items()}
        return {
            name: choice.measured(passes.get(name, profile), Chances.from_json(self.chances[name], where="score plan"))
            for name, choice in self.blocks.items()
        }


def by_domain(prompts: list[ScorePrompt], seed: int) -> list[list[ScorePrompt]]:
    """Prompts of each domain in a seeded order."""
    domains = sorted({p.domain for p in prompts})
    return [sorted((p for p in prompts if p.domain == d), key=lambda p: rank(p.id, seed=seed)) for d in domains]


def round_robin(groups: list[list[ScorePrompt]], per_group: int) -> list[ScorePrompt]:
    """The first prompts of each group, one of each in turn."""
    return [group[i] for i in range(per_group) for group in groups if i < len(group)]


def make_score_plan(
    context: RunContext,
    arms: dict[str, Arm],
    prompts: dict[str, list[ScorePrompt]],
    stops: frozenset[int],
    path: Path,
    *,
    spent_seconds: float = 0.0,
) -> ScorePlan:
    """Read the plan of an interrupted score, or choose block lengths and count prompts and fix both.

    Args:
        context: of the run.
        arms: that are scored.
        prompts: validation and held-out prompts.
        stops: tokens that end an answer.
        path: where the plan is kept.
        spent_seconds: of the time for the score that are gone already.
    """
    if path.is_file():
        data = read_json(path)
        return ScorePlan(
            {name: BlockChoice.from_json(choice, where=str(path)) for name, choice in data["blocks"].items()},
            data["prompts"],
            data["screen_at"],
            data["chances"],
            data["policies"],
            data["captured"],
        )
    cfg = context.cfg
    validation = round_robin(by_domain(prompts["validation"], cfg.seed), cfg.score.validation_prompts)
    start = time.monotonic()
    blocks, seconds_per_token = _choose_blocks(context, arms, validation, stops)
    chances = _calibrate(context, arms, blocks, prompts["validation"], stops, path.parent)
    spent = time.monotonic() - start
    groups = by_domain(prompts["heldout"], cfg.seed)
    count = cfg.budget.score_prompts
    if count is None:
        per_prompt = cfg.decode.max_new_tokens * len(cfg.score.temperatures) * sum(seconds_per_token.values())
        fast = (
            cfg.decode.max_new_tokens
            * len(cfg.score.temperatures)
            * _fast_seconds(seconds_per_token, cfg.score.screen_below)
        )
        left = cfg.budget.score_minutes * 60 - spent_seconds - spent
        screened = cfg.score.screen_after
        # Up to the screening every arm runs; after it, those that are not clearly slow.
        count = screened + int((left / len(groups) - screened * per_prompt) / fast) if screened else 0
        count = max(2, count if screened else int(left / len(groups) / per_prompt))
    chosen = round_robin(groups, count)
    screen_at = min(cfg.score.screen_after * len(groups), len(chosen))
    costs = {name: captured_costs(context, arm) for name, arm in arms.items()}
    captured = {name: known.to_json() for name, known in costs.items() if known is not None}
    policies = {name: FIXED if name in captured else cfg.lookahead.kind for name in blocks}
    fixed = [name for name in blocks if name in captured]
    if fixed and cfg.lookahead.kind != FIXED:
        logger.info(
            "captured rounds propose a fixed number of tokens: %s without lookahead=%s",
            ", ".join(fixed),
            cfg.lookahead.kind,
        )
    plan = ScorePlan(blocks, [p.id for p in chosen], screen_at, chances, policies, captured)
    write_json(path, plan.to_json())
    lengths = ", ".join(f"{name} {choice.shape}" for name, choice in blocks.items())
    logger.info("score plan: %d held-out prompts; block lengths: %s", len(chosen), lengths or "none")
    return plan


def _fast_seconds(seconds_per_token: dict[str, float], screen_below: float) -> float:
    """Seconds per token, summed over the arms that will probably pass the screening; the baseline always does."""
    base = seconds_per_token[BASELINE]
    drafts = (s for name, s in seconds_per_token.items() if name != BASELINE)
    return base + sum(s for s in drafts if base / s >= screen_below)


def _choose_blocks(
    context: RunContext, arms: dict[str, Arm], validation: list[ScorePrompt], stops: frozenset[int]
) -> tuple[dict[str, BlockChoice], dict[str, float]]:
    """Block length of every draft, and seconds per token of every arm, both from validation prompts."""
    cfg = context.cfg
    settings = [cfg.decode.settings(t) for t in cfg.score.temperatures]
    blocks: dict[str, BlockChoice] = {}
    seconds: dict[str, float] = {}
    for name, arm in arms.items():
        if name != BASELINE:
            longest = cfg.lookahead.tokens or cfg.lookahead.longest_auto
            siblings = 0 if cfg.lookahead.tokens else cfg.lookahead.siblings_auto
            own = list(cfg.lookahead.siblings)
            if arm.captured is not None:
                longest, siblings, own = arm.captured.rounds.block, 0, []
            choice = choose_block(
                arm,
                validation,
                longest=longest,
                siblings=siblings,
                settings=settings,
                max_new_tokens=min(_BLOCK_TOKENS, cfg.decode.max_new_tokens),
                stop_tokens=stops,
                pass_seconds=lambda width: context.plan.profile.pass_seconds(context.plan.block_precision, width),
                seed=cfg.seed,
                costs=captured_costs(context, arm),
            )
            if cfg.lookahead.tokens:
                choice = dataclasses.replace(choice, tokens=longest, siblings=own)
            blocks[name] = with_tree(context, arm, choice, validation, stops)
        timed = with_lookahead(context, arm, blocks.get(name))
        records = score_prompt(
            [dataclasses.replace(timed, name=BASELINE)],
            validation[0],
            settings=settings[0],
            max_new_tokens=min(_BLOCK_TOKENS, cfg.decode.max_new_tokens),
            stop_tokens=stops,
            seed=cfg.seed,
        )
        seconds[name] = records[0].total_seconds / records[0].emitted
    return blocks, seconds


def _calibrate(
    context: RunContext,
    arms: dict[str, Arm],
    blocks: dict[str, BlockChoice],
    validation: list[ScorePrompt],
    stops: frozenset[int],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """What the signals of every draft are worth; taken as they are for policies that do not go by them."""
    cfg = context.cfg
    if not cfg.lookahead.calibrates:
        return {name: Chances().to_json() for name in blocks}
    chosen = round_robin(by_domain(validation, cfg.seed), cfg.score.calibration_prompts)
    found = {
        name: calibrate(
            arms[name],
            chosen,
            tokens=choice.tokens,
            settings=[cfg.decode.settings(t) for t in cfg.score.temperatures],
            max_new_tokens=cfg.decode.max_new_tokens,
            stop_tokens=stops,
            seed=cfg.seed,
            folder=folder,
        )
        for name, choice in blocks.items()
    }
    return {name: chances.to_json() for name, chances in found.items()}


def with_lookahead(context: RunContext, arm: Arm, choice: BlockChoice | None, measured: Measured | None = None) -> Arm:
    """The arm with the policy it is scored under; a captured one proposes the same number of tokens every round, in a
    chain or in the tree that was chosen for such rounds.

    Args:
        context: of the run.
        arm: target and drafter.
        choice: block of the draft; None for the baseline.
        measured: of the draft; None for a block of the chosen length whatever the policy, as the time plan wants it.
    """
    if choice is None:
        captured = prepared(context, arm, 0)
    else:
        captured = prepared(context, arm, choice.tokens, choice.tree, tree_when_sampled=choice.tree_when_sampled)
    lookahead: Lookahead = FixedLookahead(0)
    if captured is not None:
        rounds = captured.rounds
        lookahead = FixedLookahead(rounds.block, tree=captured.tree, tree_when_sampled=rounds.tree_when_sampled)
    elif choice is not None and measured is None:
        lookahead = FixedLookahead(choice.tokens, siblings=choice.siblings)
    elif choice is not None:
        lookahead = context.cfg.lookahead.build(choice.tokens, choice.siblings, measured)
    return Arm(arm.name, arm.target, arm.drafter, lookahead, captured)
