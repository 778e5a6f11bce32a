"""Stage 4: choose the draft whose measured speedup is best, and say why. `none` is always a candidate and can win."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from inference.errors import InputError
from inference.records import Record
from inference.statistics import BASELINE, Estimate, Scorecard, find_card, speed_ratio
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.context import RunContext
from pipelines.files import read_json, write_json
from pipelines.score_files import RECORDS_FILE, read_records, read_scorecards
from pipelines.stage_config import SelectConfig

logger = logging.getLogger(__name__)

DECISION_FILE = "decision.json"


@dataclass(frozen=True)
class Candidate:
    """One row of the decision.

    Attributes:
        arm: draft name.
        speedup: measured, with its interval.
        tau: emitted tokens per target pass.
        draft_bytes: memory of the draft.
        refused: why it may not win; empty when it may.
    """

    arm: str
    speedup: Estimate
    tau: float
    draft_bytes: int
    refused: str


@dataclass(frozen=True)
class Decision:
    """What was chosen and why.

    Attributes:
        winner: draft name.
        reason: in one sentence.
        candidates: every arm, best speedup first.
        tied: drafts that could not be told apart from the fastest one.
    """

    winner: str
    reason: str
    candidates: list[Candidate]
    tied: list[str]


def select_spec(context: RunContext, score: Artifact) -> Spec:
    """What a decision is made from."""
    return Spec("select", config={"select": context.cfg.select}, inputs={"score": score.digest}, seed=context.cfg.seed)


def run_select(context: RunContext, score: Artifact) -> Artifact:
    """Decide, or find the decision."""

    def make(work: Work) -> None:
        decision = decide(
            read_scorecards(score.path),
            read_records(score.path / RECORDS_FILE),
            cfg=context.cfg.select,
            seed=context.cfg.seed,
        )
        write_json(work.folder / DECISION_FILE, asdict(decision))
        work.metrics |= {"winner": decision.winner, "reason": decision.reason}

    return context.store.obtain(select_spec(context, score), make=make)


def read_decision(artifact: Artifact) -> Decision:
    """Read a decision artifact."""
    data: dict[str, Any] = read_json(artifact.path / DECISION_FILE)
    candidates = [Candidate(**{**c, "speedup": Estimate(**c["speedup"])}) for c in data["candidates"]]
    return Decision(**{**data, "candidates": candidates})


def decide(cards: list[Scorecard], records: list[Record], *, cfg: SelectConfig, seed: int) -> Decision:
    """Best measured speedup whose lower bound beats target-only decoding, within the limits; ties go to the cheaper.

    Two drafts are tied when the interval of the paired ratio of their speeds contains 1.

    Args:
        cards: scorecards of one run.
        records: the records behind them.
        cfg: limits.
        seed: of the bootstrap.

    Raises:
        InputError: nothing was scored at the configured temperature.
    """
    check_temperature(cfg, scored=[card.temperature for card in cards if card.temperature is not None])
    arms = list(dict.fromkeys(card.arm for card in cards))
    chosen = {arm: find_card(cards, arm, temperature=cfg.temperature) for arm in arms}
    candidates = [_candidate(card, cfg) for card in chosen.values()]
    candidates.sort(key=lambda c: -c.speedup.value)
    eligible = [c for c in candidates if not c.refused]
    if not eligible:
        fastest = next((c for c in candidates if c.arm != BASELINE), None)
        why = f"the fastest, {fastest.arm}, {fastest.refused}" if fastest else "nothing else was scored"
        return Decision(BASELINE, f"no draft may win: {why}", candidates, [])
    best = eligible[0]
    tied = [best] + [
        c
        for c in eligible[1:]
        if not speed_ratio(records, best.arm, c.arm, temperature=cfg.temperature, seed=seed).surely_above(1.0)
    ]
    winner = min(tied, key=lambda c: (c.draft_bytes, -c.speedup.value))
    reason = f"speedup {winner.speedup} beats target-only decoding"
    if winner is not best:
        reason += f"; {best.arm} is not measurably faster and costs more memory"
    return Decision(winner.arm, reason, candidates, [c.arm for c in tied if c is not winner])


def check_temperature(cfg: SelectConfig, *, scored: list[float]) -> None:
    """Refuse a temperature that is not among the scored ones.

    Raises:
        InputError: it is not.
    """
    if cfg.temperature is not None and cfg.temperature not in scored:
        known = ", ".join(f"{temperature:g}" for temperature in dict.fromkeys(scored))
        raise InputError(
            f"nothing is scored at temperature {cfg.temperature:g}",
            where="select.temperature",
            mend=f"choose one of {known}, null for all, or add it to score.temperatures",
        )


def _candidate(card: Scorecard, cfg: SelectConfig) -> Candidate:
    """One arm with the reason it may not win, if there is one."""
    refused = ""
    if card.arm == BASELINE:
        refused = "is the baseline"
    elif card.speedup.low is None:
        refused = "was scored on one prompt, which gives no interval"
    elif not card.speedup.surely_above(1.0):
        refused = f"has a lower bound of {card.speedup.low:.2f}, which does not beat 1"
    elif card.speedup.value > card.tau.value:
        refused = f"is faster than its tau of {card.tau.value:.2f} allows: noise of the machine, not the draft's doing"
    elif cfg.max_draft_mib and card.draft_bytes > cfg.max_draft_mib * 2**20:
        refused = f"needs {card.draft_bytes / 2**20:.0f} MiB, more than {cfg.max_draft_mib:g}"
    elif card.alpha is not None and card.alpha.value < cfg.min_alpha:
        refused = f"has acceptance {card.alpha.value:.2f}, below {cfg.min_alpha:g}"
    return Candidate(card.arm, card.speedup, card.tau.value, card.draft_bytes, refused)
