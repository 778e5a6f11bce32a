"""Which candidates are worth decoding: ranked by the pre-score on validation prompts, before anything is decoded.

The target answers a few prompts once; every draft is rehearsed on the answers (`inference.prescore`), and those with
the best expected speedup are scored. A draft that cannot be rehearsed is scored in any case, and so is the baseline.
The ranking is written at once and read back by a score that was interrupted.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inference.drafters import ReadsFeatures
from inference.prescore.ranking import Prescore, prescore
from inference.prescore.responses import fixed_responses
from inference.scoring import Arm, ScorePrompt
from inference.statistics import BASELINE
from pipelines.captured import captured_costs
from pipelines.context import RunContext
from pipelines.files import read_json, write_json
from pipelines.report import markdown_table
from pipelines.score_plan import by_domain, round_robin

logger = logging.getLogger(__name__)

PRESCORE_FILE = "prescore.json"


@dataclass(frozen=True)
class Ranked:
    """One candidate.

    Attributes:
        arm: draft name.
        prescore: None where the draft cannot be rehearsed.
        decoded: whether it is scored.
    """

    arm: str
    prescore: Prescore | None
    decoded: bool


@dataclass(frozen=True)
class Ranking:
    """All candidates.

    Attributes:
        candidates: best expected speedup first; those without a pre-score last.
        responses: fixed responses behind it.
        seconds: that it took.
    """

    candidates: list[Ranked]
    responses: int
    seconds: float

    def kept(self, arms: Mapping[str, Arm]) -> dict[str, Arm]:
        """The arms that are scored, the baseline among them."""
        left_out = {candidate.arm for candidate in self.candidates if not candidate.decoded}
        return {name: arm for name, arm in arms.items() if name not in left_out}

    def to_json(self) -> dict[str, Any]:
        """For the score's folder."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "Ranking":
        """Read what `to_json` wrote."""
        candidates = [
            Ranked(row["arm"], None if row["prescore"] is None else Prescore(**row["prescore"]), row["decoded"])
            for row in data["candidates"]
        ]
        return cls(candidates, data["responses"], data["seconds"])


def rank_arms(
    context: RunContext,
    arms: Mapping[str, Arm],
    validation: list[ScorePrompt],
    stops: frozenset[int],
    path: Path,
) -> Ranking | None:
    """Read the ranking of an interrupted score, or make it; None where every candidate is scored anyway.

    Args:
        context: of the run.
        arms: all of them, the baseline among them.
        validation: prompts of the validation split.
        stops: tokens that end an answer.
        path: where the ranking is kept.
    """
    best = context.cfg.score.decode_best
    drafts = {name: arm for name, arm in arms.items() if name != BASELINE}
    if not best or len(drafts) <= best:
        return None
    if path.is_file():
        return Ranking.from_json(read_json(path))
    start = time.monotonic()
    captured = captured_costs(context, arms[BASELINE])
    base = context.plan.profile.pass_seconds(context.plan.baseline_precision, 1)
    base = base if captured is None else captured.seconds(0)
    found, responses = _prescores(context, drafts, validation, stops, baseline_seconds=base)
    ranked = {name: known for name, known in found.items() if known is not None}
    order = sorted(ranked, key=lambda name: -ranked[name].speedup)
    kept = set(order[:best])
    candidates = [Ranked(name, ranked[name], name in kept) for name in order]
    candidates += [Ranked(name, None, decoded=True) for name in drafts if name not in ranked]
    ranking = Ranking(candidates, responses, time.monotonic() - start)
    write_json(path, ranking.to_json())
    logger.info(
        "pre-score in %.0f s: decoded are %s; left out are %s",
        ranking.seconds,
        ", ".join(_named(candidate) for candidate in candidates if candidate.decoded),
        ", ".join(_named(candidate) for candidate in candidates if not candidate.decoded) or "none",
    )
    return ranking


def _named(candidate: Ranked) -> str:
    expected = "no pre-score" if candidate.prescore is None else f"{candidate.prescore.speedup:.2f}"
    return f"{candidate.arm} ({expected})"


def _prescores(
    context: RunContext,
    drafts: Mapping[str, Arm],
    validation: list[ScorePrompt],
    stops: frozenset[int],
    *,
    baseline_seconds: float,
) -> tuple[dict[str, Prescore | None], int]:
    """The pre-score of every draft, over all temperatures together, and how many responses it rests on."""
    cfg, plan = context.cfg, context.plan
    target = next(iter(drafts.values())).target
    readers = [arm.drafter for arm in drafts.values() if isinstance(arm.drafter, ReadsFeatures)]
    prompts = round_robin(by_domain(validation, cfg.seed), cfg.score.prescore_prompts)
    responses = [
        response
        for temperature in cfg.score.temperatures
        for response in fixed_responses(
            target,
            prompts,
            settings=cfg.decode.settings(temperature),
            max_new_tokens=cfg.decode.max_new_tokens,
            stop_tokens=stops,
            seed=cfg.seed,
            taps=[tap for reader in readers for tap in reader.taps],
        )
    ]
    found = {
        name: prescore(
            arm.drafter,
            responses,
            lengths=_lengths(context, arm),
            passes=plan.profile.passes[plan.block_precision],
            baseline_seconds=baseline_seconds,
            device=target.device,
            captured=captured_costs(context, arm),
        )
        for name, arm in drafts.items()
    }
    return found, len(responses)


def _lengths(context: RunContext, arm: Arm) -> list[int]:
    """Block lengths that the score may give an arm."""
    lookahead = context.cfg.lookahead
    longest = lookahead.tokens or lookahead.longest_auto
    longest = longest if arm.captured is None else arm.captured.rounds.block
    return [longest] if lookahead.tokens else [*range(1, longest + 1)]


def prescore_markdown(ranking: Ranking) -> str:
    """The ranking as a section of the scorecard."""
    temperatures = sorted({t for c in ranking.candidates if c.prescore for t in c.prescore.taus}, key=float)
    rows = []
    for candidate in ranking.candidates:
        known = candidate.prescore
        figures = ["-"] * (len(temperatures) + 2)
        if known is not None:
            figures = [*(f"{known.taus[t]:.2f}" for t in temperatures), str(known.tokens), f"{known.speedup:.2f}"]
        rows.append([candidate.arm, *figures, "yes" if candidate.decoded else "no"])
    header = ["draft", *(f"expected tau, T={t}" for t in temperatures), "block", "expected speedup", "decoded"]
    return (
        f"## Pre-score (validation prompts)\n\nWhat {ranking.responses} fixed responses of the target say without "
        "decoding, all temperatures together, siblings left out; the best are decoded (score.decode_best).\n\n"
        + markdown_table(header, rows)
    )
