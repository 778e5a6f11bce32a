"""`dspark realign`: one cycle, from what the monitor says to a decision that is published or not.

Made to be run by a timer: nothing to do ends at once, a cycle that was killed goes on. The caller holds the registry
lock.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from inference.errors import InputError
from inference.pair_files import read_pair
from inference.target import target_digest
from inference.traffic import TrafficRecord, read_traffic
from pipelines.artifacts import Artifact, Store
from pipelines.build import run_build
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.corpus import run_corpus
from pipelines.drift.report import run_drift
from pipelines.errors import ChampionKept
from pipelines.files import canonical_json, read_json, sha256_bytes, write_json
from pipelines.publish import run_publish
from pipelines.realign.candidates import CHALLENGER, Candidates, candidates, responses, sources
from pipelines.realign.cause import find_cause, to_json
from pipelines.realign.cycle import (
    FOLDER,
    GAVE_UP,
    KEPT,
    PROMOTED,
    Cycle,
    Ended,
    abandon,
    begin,
    end,
    failures,
    history,
    must_wait,
    now,
    open_cycle,
)
from pipelines.realign.gate import KEEP, PROMOTE
from pipelines.realign.measure import read_verdict, run_gate
from pipelines.realign.notify import announce
from pipelines.realign.snapshot import take_snapshot
from pipelines.registry import CHAMPION as CHAMPION_ALIAS
from pipelines.registry import alias_target

logger = logging.getLogger(__name__)

CAUSE_FILE = "cause.json"
_DAY_S = 86_400.0


def run_realign(cfg: RunConfig) -> float:
    """One cycle, where there is reason for one.

    Returns:
        Speed of the new champion over the old one, both on the present target; 1 where there was nothing to do.

    Raises:
        InputError: no champion, no traffic to learn from, or anything a stage refuses.
        ChampionKept: a cycle ran and did not promote its challenger.
    """
    pair = cfg.paths.registry / cfg.publish.name
    present = target_digest(cfg.target.folder(cfg.paths.cache))
    cycle = _resumed(pair, present)
    if cycle is None:
        cycle = _new(cfg, pair, present)
    if cycle is None:
        return 1.0
    ended = _run(cfg, pair, cycle)
    end(pair, ended)
    folder = pair / FOLDER / cycle.id
    announce(
        ended,
        pair=cfg.publish.name,
        url=cfg.realign.webhook,
        tracker=cfg.tracker.build(folder / "tracker", f"realign-{cycle.id}", {"pair": cfg.publish.name}),
    )
    if ended.outcome != PROMOTED:
        raise ChampionKept(f"re-alignment kept {cycle.champion} [{cfg.publish.name}]: {ended.reason}")
    logger.info("re-aligned  %s -> %s: %s", ended.champion, ended.version, ended.reason)
    return float(ended.figures["speed_ratio"])


def champion_folder(cfg: RunConfig) -> Path:
    """Version folder of the champion.

    Raises:
        InputError: there is none.
    """
    pair = cfg.paths.registry / cfg.publish.name
    version = alias_target(cfg.paths.registry, cfg.publish.name, CHAMPION_ALIAS)
    if version is None:
        raise InputError("no champion to re-align", where=str(pair), mend="publish a pair first: dspark")
    return pair / version


def _resumed(pair: Path, present: str) -> Cycle | None:
    """The cycle under way; one for a target that has changed again since is given up."""
    cycle = open_cycle(pair)
    if cycle is None:
        return None
    if any(one.id == cycle.id for one in history(pair)):
        abandon(pair)  # killed between its last two steps
        return None
    if cycle.target_digest != present:
        logger.warning("cycle %s was for another target than there is now: started anew", cycle.id)
        abandon(pair)
        return None
    logger.info("cycle %s goes on, started %s", cycle.id, cycle.started)
    return cycle


def _new(cfg: RunConfig, pair: Path, present: str) -> Cycle | None:
    """Look at the monitor, and begin a cycle where it is time for one."""
    champion = champion_folder(cfg)
    info = read_pair(champion)
    log = Path(cfg.drift.log)
    report = run_drift(champion, cfg.target.folder(cfg.paths.cache), present, log, pair / FOLDER / "drift", cfg.drift)
    why = [alarm.why for alarm in report.alarms]
    if cfg.realign.force:
        why.append("realign.force asks for it")
    if not why:
        logger.info("nothing to do: %s is as it was published, by %s", champion.name, log)
        return None
    past = history(pair)
    if waiting := must_wait(past, cooldown_hours=cfg.realign.cooldown_hours, max_per_day=cfg.realign.max_per_day):
        logger.info("nothing done: %s", waiting)
        return None
    records = read_traffic(log).records
    target_moved = present != info["target"]["digest"]
    if cfg.realign.economic and not target_moved and not cfg.realign.force:
        saved, cost = expected_saving(info, records, cfg)
        logger.info(
            "expected to save %.0f s in %g days for %.0f s of retraining", saved, cfg.realign.horizon_days, cost
        )
        if saved <= cost:
            logger.info("nothing done: it would not pay")
            return None
    snapshot = take_snapshot(
        Store(cfg.paths.artifacts),
        records,
        recent=cfg.realign.recent,
        heldout_share=cfg.realign.heldout_share,
        where=str(log),
    )
    started = now().isoformat(timespec="seconds")
    made_from = {"champion": champion.name, "target": present, "snapshot": snapshot.digest, "started": started}
    cycle = Cycle(
        id=sha256_bytes(canonical_json(made_from))[:12],
        started=started,
        champion=champion.name,
        target_digest=present,
        snapshot=snapshot.path.name,
        failures=failures(past, present),
        why=why,
    )
    begin(pair, cycle)
    logger.info("cycle %s: %s", cycle.id, "; ".join(why))
    return cycle


def _run(cfg: RunConfig, pair: Path, cycle: Cycle) -> Ended:
    """Corpus, training, gate and, where it says so, publication; every step is found again after a kill."""
    snapshot = Artifact.load(cfg.paths.artifacts / "traffic" / cycle.snapshot)
    champion = pair / cycle.champion
    info = read_pair(champion)
    target_folder = cfg.target.folder(cfg.paths.cache)
    made = candidates(champion, target_folder, cfg.realign, failures=cycle.failures)
    if made.fresh:
        logger.info("the challenger starts from new weights: %s", made.why_fresh)
    context = _context(cfg, made, snapshot.path, info)
    corpus = run_corpus(context)
    cause_path = pair / FOLDER / cycle.id / CAUSE_FILE
    if not cause_path.is_file() and made.opponent != "none":
        cause = find_cause(
            champion,
            info,
            target=cfg.target,
            present_digest=cycle.target_digest,
            cache=cfg.paths.cache,
            precision=context.plan.block_precision,
            snapshot=snapshot.path,
            prompts=cfg.realign.cause_prompts,
            max_new_tokens=cfg.decode.max_new_tokens,
        )
        cause_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(cause_path, to_json(cause))
    drafts = run_build(context, corpus)
    gate = run_gate(context, corpus, drafts, made)
    verdict, figures = read_verdict(gate)
    trained = drafts[made.trained].metrics
    figures = {
        **{name: figures[name] for name in ("speed_ratio", "tau_champion", "tau_challenger", "prompts", "opponent")},
        "tokens": trained["tokens"],
        "token_share": trained["tokens"] / _first_tokens(info) if _first_tokens(info) else None,
        "seconds": trained["seconds"],
        "fresh": made.fresh,
        "why": cycle.why,
        "cause": read_json(cause_path)["words"] if cause_path.is_file() else [],
    }
    evidence = {"corpus": corpus.digest, "draft": drafts[CHALLENGER].digest, "gate": gate.digest}
    version = ""
    if verdict.outcome == PROMOTE:
        training = {
            "steps": trained["steps"],
            "tokens": trained["tokens"],
            "seconds": trained["seconds"],
            "first_tokens": trained["tokens"] if made.fresh else _first_tokens(info) or trained["tokens"],
            "went_on_from": "" if made.fresh else cycle.champion,
        }
        version = run_publish(context, corpus, drafts, gate, gate, training=training).name
    outcome = {PROMOTE: PROMOTED, KEEP: KEPT}.get(verdict.outcome, GAVE_UP)
    return Ended(
        id=cycle.id,
        started=cycle.started,
        ended=now().isoformat(timespec="seconds"),
        outcome=outcome,
        reason=verdict.reason,
        champion=cycle.champion,
        version=version,
        target_digest=cycle.target_digest,
        evidence=evidence,
        figures=figures,
    )


def _first_tokens(info: dict[str, Any]) -> int:
    """Tokens of the training that the draft's line began with; 0 where that is not known."""
    training = info.get("training", {})
    return int(training.get("first_tokens", training.get("tokens", 0)))


def _context(cfg: RunConfig, made: Candidates, snapshot: Path, info: dict[str, Any]) -> RunContext:
    """The run's configuration turned into that of a cycle: its prompts, its drafts, its numbers."""
    realign = cfg.realign
    own = dataclasses.replace(
        cfg,
        prompts=sources(cfg, snapshot),
        draft=made.drafts,
        budget=dataclasses.replace(cfg.budget, responses=responses(cfg, snapshot), score_prompts=1),
        score=dataclasses.replace(cfg.score, screen_after=0),
    )
    context = RunContext.open(own)
    steps = context.plan.steps[made.trained]
    most = _most_steps(made, info, realign.token_share)
    if most and steps > most:
        share = 100 * realign.token_share
        logger.info("%d steps for %d: no more than %.0f %% of the first training's tokens", most, steps, share)
        steps = most
    plan = dataclasses.replace(context.plan, steps={**context.plan.steps, made.trained: steps})
    return dataclasses.replace(context, plan=plan)


def _most_steps(made: Candidates, info: dict[str, Any], share: float) -> int:
    """Steps within a share of the first training's tokens, by what a step of the champion's own took; 0 for any."""
    training = info.get("training", {})
    if not share or not training.get("tokens") or not training.get("steps"):
        return 0
    step_tokens = training["tokens"] / training["steps"] * made.step_share
    return max(10, int(share * _first_tokens(info) / step_tokens))


def expected_saving(info: dict[str, Any], records: list[TrafficRecord], cfg: RunConfig) -> tuple[float, float]:
    """Seconds of decoding that a return to the published acceptance would save within the horizon, and those that
    retraining takes.

    A round of the pair costs what it costs whatever is accepted, so seconds a token go as 1 / tau.
    """
    mine = [r for r in records if r.pair == f"{info['name']}/{info['version']}" and r.passes and r.emitted]
    if len(mine) < 2:
        return 0.0, cfg.budget.training_minutes * 60
    cards = info["scorecard"]
    published = next(c["tau"]["value"] for c in cards if c["domain"] == "overall" and c["temperature"] is None)
    tau = sum(r.emitted for r in mine) / sum(r.passes for r in mine)
    span = max(r.time for r in mine) - min(r.time for r in mine)
    seconds_a_day = sum(r.seconds for r in mine) / max(span, 1.0) * _DAY_S
    saved = seconds_a_day * max(0.0, 1 - tau / published) * cfg.realign.horizon_days
    budget = cfg.budget
    return saved, 60 * (budget.corpus_minutes + budget.training_minutes + budget.score_minutes)
