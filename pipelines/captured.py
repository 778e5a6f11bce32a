"""Captured rounds in a score: which arms are decoded by them, prepared before anything is timed, and what they take.

On a GPU a round run kernel by kernel is nearly all launches (docs/gpu.md), and speeds measured like that say little.
The baseline is captured whenever anything is: a draft is compared with the fastest target-only decoding there is.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference.costs import RoundCosts
from inference.errors import InputError
from inference.graphed.arms import can_be_captured, captured_decoder, longest_block
from inference.graphed.asked import CAPTURED_AUTO, CAPTURED_ON
from inference.graphed.decode import GraphedDecoder, follows
from inference.graphed.timing import costs_of
from inference.scoring import Arm
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
    return captured_decoder(arm.target, arm.drafter, block=block, tokens=tokens)


def prepared(context: RunContext, arm: Arm, tokens: int) -> GraphedDecoder | None:
    """The decoder of a captured arm with blocks of `tokens` tokens or what it has, all of it captured; None for an arm
    that is not captured. Asked for the same again, it is the same."""
    if arm.captured is None:
        return None
    cfg = context.cfg
    decoder = arm.captured.of_block(min(tokens, arm.captured.rounds.block))
    longest = min(cfg.score.max_prompt_tokens, arm.target.context_limit - 1)
    decoder.prepare(longest_prompt=longest, sampled={t > 0.0 for t in cfg.score.temperatures})
    return decoder


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
        "the rest of each request.\n\n" + markdown_table(header, rows)
    )
