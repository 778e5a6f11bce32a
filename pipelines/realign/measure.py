"""The gate's measurement: target-only decoding, champion and challenger in one process on the held-out traffic, in
random order prompt by prompt, until the gate has decided. A killed one goes on after its last whole prompt.
"""

import logging
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from distill.prompts import rank
from inference.records import Record
from inference.scoring import Arm, ScorePrompt
from inference.statistics import find_card, scorecards, speed_ratio
from inference.target import stop_tokens
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.context import RunContext
from pipelines.corpus import read_prompts
from pipelines.files import read_json, write_json, write_text
from pipelines.progress import tracked
from pipelines.realign.candidates import CHALLENGER, Candidates
from pipelines.realign.gate import PROMOTE, Gate, Verdict, pairings
from pipelines.score import (
    SCORE_PLAN_FILE,
    check_scorecards,
    decode_missing,
    load_arms,
    score_prompts,
    score_spec,
    warm_up,
    whole_records,
    write_results,
)
from pipelines.score_files import RECORDS_FILE, read_records
from pipelines.score_plan import make_score_plan, with_lookahead
from pipelines.select import DECISION_FILE, Candidate, Decision

logger = logging.getLogger(__name__)

GATE_FILE, GATE_TABLE_FILE, GATE_PLOT_FILE = "gate.json", "gate.md", "gate.png"


def gate_spec(context: RunContext, corpus: Artifact, drafts: dict[str, Artifact]) -> Spec:
    """What a gate is made from: all that a score is, and its own levels."""
    score = score_spec(context, corpus, drafts)
    return Spec("gate", config={**score.config, "gate": context.cfg.realign.gate}, inputs=score.inputs, seed=score.seed)


def run_gate(context: RunContext, corpus: Artifact, drafts: dict[str, Artifact], made: Candidates) -> Artifact:
    """Measure until the gate decides, or find the decision.

    Raises:
        InputError: no held-out prompt is short enough, or a draft does not fit the target.
        ScoreError: the measurements contradict themselves.
    """
    arms = {name: drafts[name] for name in made.scored}
    spec = gate_spec(context, corpus, arms)
    return context.store.obtain(spec, make=lambda work: _make(context, corpus, arms, made.opponent, work))


def read_verdict(gate: Artifact) -> tuple[Verdict, dict[str, Any]]:
    """The decision, and the figures behind it."""
    data = read_json(gate.path / GATE_FILE)
    return Verdict(**data["verdict"]), data["figures"]


def _make(context: RunContext, corpus: Artifact, drafts: dict[str, Artifact], opponent: str, work: Work) -> None:
    cfg = context.cfg
    arms = load_arms(context, drafts)
    first = next(iter(arms.values()))
    prompts = score_prompts(read_prompts(corpus.path), first.target, cfg.score.max_prompt_tokens)
    stops = stop_tokens(first.target)
    plan = make_score_plan(context, arms, prompts, stops, work.folder / SCORE_PLAN_FILE)
    if opponent in plan.blocks:
        # Drafts are compared and not shapes of blocks: both propose as suits the opponent on this target.
        plan.blocks[CHALLENGER] = plan.blocks[CHALLENGER].shaped_as(plan.blocks[opponent])
    measured = plan.measured(context)
    arms = {n: with_lookahead(context, arm, plan.blocks.get(n), measured.get(n)) for n, arm in arms.items()}
    warm_up(context, arms, prompts["validation"][0], stops)
    # In the mix of the traffic, whatever the domain.
    order = sorted(prompts["heldout"], key=lambda prompt: rank(prompt.id, seed=cfg.seed))
    order = order[: cfg.realign.gate.max_prompts]
    path = work.folder / RECORDS_FILE
    records = whole_records(
        read_records(path), [p.id for p in order], plan, arms=list(arms), below=cfg.score.screen_below
    )
    gate, verdict, records = _decide(context, list(arms.values()), order, records, opponent, stops, path)
    cards = scorecards(records, price_per_hour=cfg.score.price_per_hour, seed=cfg.seed)
    check_scorecards(cards)
    write_results(work, cards, plan, context, arms)
    _write_gate(work, gate, verdict, records, opponent, dict(Counter(prompt.domain for prompt in order)))
    write_json(work.folder / DECISION_FILE, asdict(_decision(verdict, records, cards, opponent)))
    logger.info("gate: %s after %d prompts: %s", verdict.outcome, len(gate.looks), verdict.reason)


def _decide(
    context: RunContext,
    arms: list[Arm],
    order: list[ScorePrompt],
    records: list[Record],
    opponent: str,
    stops: frozenset[int],
    path: Path,
) -> tuple[Gate, Verdict, list[Record]]:
    """Feed the gate prompt by prompt, decoding what has no records yet, until it decides.

    Returns:
        the gate, its verdict, and the records of the prompts it has seen, which are then all that the file holds.
    """
    write_text(path, "".join(record.to_json() + "\n" for record in records))  # drops what was torn
    done = {(record.prompt_id, record.temperature) for record in records}
    gate = Gate(context.cfg.realign.gate, dict(Counter(prompt.domain for prompt in order)))
    seen: list[Record] = []
    verdict: Verdict | None = None
    with path.open("a", encoding="utf-8") as stream:
        for prompt in tracked(order, "gate", unit="prompts"):
            mine = [record for record in records if record.prompt_id == prompt.id]
            mine += decode_missing(context, arms, prompt, done, stops, stream)
            seen += mine
            (pairing,) = pairings(mine, challenger=CHALLENGER, champion=opponent)
            verdict = gate.update(pairing)
            if verdict is not None:
                break
    assert verdict is not None, "a gate decides at its last prompt at the latest"
    write_text(path, "".join(record.to_json() + "\n" for record in seen))
    return gate, verdict, seen


def _decision(verdict: Verdict, records: list[Record], cards: list[Any], opponent: str) -> Decision:
    """The verdict as the publish stage reads it."""
    arms = list(dict.fromkeys(record.arm for record in records))
    candidates = []
    for arm in arms:
        card = find_card(cards, arm)
        refused = "" if arm == CHALLENGER and verdict.outcome == PROMOTE else f"gate: {verdict.outcome}"
        candidates.append(Candidate(arm, card.speedup, card.tau.value, card.draft_bytes, refused))
    candidates.sort(key=lambda c: -c.speedup.value)
    winner = CHALLENGER if verdict.outcome == PROMOTE else opponent
    return Decision(winner, f"re-alignment: {verdict.reason}", candidates, [])


def _write_gate(
    work: Work, gate: Gate, verdict: Verdict, records: list[Record], opponent: str, counts: dict[str, int]
) -> None:
    """Evidence as data, table and picture."""
    pairs = pairings(records, challenger=CHALLENGER, champion=opponent)
    domains = sorted({pair.domain for pair in pairs})
    rows = []
    for domain in [*domains, "overall"]:
        mine = [r for r in records if domain in ("overall", r.domain)]
        rows.append(
            (domain, len({r.prompt_id for r in mine}), speed_ratio(mine, CHALLENGER, opponent), _taus(mine, opponent))
        )
    overall = rows[-1]
    figures = {
        "speed_ratio": overall[2].value,
        "tau_champion": overall[3][0],
        "tau_challenger": overall[3][1],
        "prompts": overall[1],
        "opponent": opponent,
        "available": counts,
        "domains": {d: {"prompts": n, "speed_ratio": asdict(r), "tau": list(t)} for d, n, r, t in rows},
    }
    write_json(
        work.folder / GATE_FILE,
        {"verdict": asdict(verdict), "figures": figures, "looks": [asdict(look) for look in gate.looks]},
    )
    lines = [
        f"# Gate: {verdict.outcome}",
        "",
        f"{verdict.reason}. Challenger against {opponent}, the same prompts, arms in random order.",
        "",
        "| domain | prompts | speed, challenger / opponent | tau opponent | tau challenger |",
        "|---|---|---|---|---|",
        *(f"| {d} | {n} | {ratio} | {taus[0]:.2f} | {taus[1]:.2f} |" for d, n, ratio, taus in rows),
    ]
    write_text(work.folder / GATE_TABLE_FILE, "\n".join(lines) + "\n")
    _plot(gate, work.folder / GATE_PLOT_FILE)
    work.metrics |= {"outcome": verdict.outcome, "reason": verdict.reason, **figures}


def _taus(records: list[Record], opponent: str) -> tuple[float, float]:
    taus = []
    for arm in (opponent, CHALLENGER):
        mine = [record for record in records if record.arm == arm]
        taus.append(sum(r.emitted for r in mine) / max(1, sum(r.passes for r in mine)))
    return taus[0], taus[1]


def _plot(gate: Gate, path: Path) -> None:
    """Wealth against the number of prompts, with the line at which a null is refuted."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    at = range(1, len(gate.looks) + 1)
    decimal = math.log(10)
    axes.plot(at, [look.faster / decimal for look in gate.looks], label="not faster", color="black", linewidth=2)
    for name in sorted({name for look in gate.looks for name in look.domains}):
        values = [look.domains[name] / decimal for look in gate.looks]
        axes.plot(at, values, label=f"{name}: slower by {gate.cfg.margin:.0%}")
    axes.plot(at, [look.useless / decimal for look in gate.looks], ":", label=f"gains {gate.cfg.useful:.0%} or more")
    axes.axhline(-math.log10(gate.cfg.alpha), color="grey", linestyle="--", label=f"refuted at {gate.cfg.alpha:g}")
    axes.set_xlabel("held-out prompts")
    axes.set_ylabel("evidence against (log10 of wealth)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
