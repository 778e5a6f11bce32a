"""The stages in their order, over typed configuration. A stage that has its output already is skipped and says so."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from inference.errors import InputError
from inference.placement import placing
from inference.statistics import BASELINE, find_card
from inference.target import target_digest
from pipelines.artifacts import Artifact, Spec
from pipelines.build import check_needed, draft_spec, offered, run_build
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.corpus import corpus_spec, run_corpus
from pipelines.drift.report import run_drift
from pipelines.load import LOAD_PLOT_FILE, LOAD_TABLE_FILE, check_load_draft, run_load
from pipelines.locks import registry_lock
from pipelines.planning.stage import run_planning
from pipelines.preflight import check_training
from pipelines.publish import run_publish, summary
from pipelines.realign.cycle import FOLDER as REALIGN_FOLDER
from pipelines.realign.stage import champion_folder, run_realign
from pipelines.registry import CHAMPION, roll_back
from pipelines.score import check_baseline, run_score, score_spec
from pipelines.score_files import PLOT_FILE, TABLE_FILE, read_scorecards
from pipelines.select import Decision, check_temperature, read_decision, run_select, select_spec
from pipelines.took import read_stages, stage_rows

logger = logging.getLogger(__name__)

Output = TypeVar("Output")


def run(cfg: RunConfig, stage: str) -> float:
    """Run one stage, or all of them.

    Args:
        cfg: typed configuration.
        stage: `all`, or one of `pipelines.config.STAGES` and `EXTRA`.

    Returns:
        The stage's objective, for sweepers to maximise: response tokens (corpus), mean held-out acceptance of the
        trained drafts (build), measured speedup of the best draft (score), of the chosen one (select, publish, all),
        mean throughput under load over target-only decoding (load), alarms (drift), speed over the champion before
        (realign, rollback: 1), 1 when a plan fits (plan).

    Raises:
        InputError: bad input, or an earlier stage has not been run.
        RegistryBusy: another run holds the registry.
        ChampionKept: a re-alignment ran and did not promote.
    """
    with placing(cfg.processes.decode, large=cfg.target.spread_teacher):
        return _run(cfg, stage)


def _run(cfg: RunConfig, stage: str) -> float:
    if stage == "plan":
        return run_planning(cfg)
    if stage in _ON_PAIRS:
        with nullcontext() if stage == "drift" else registry_lock(cfg.paths.registry):
            return _ON_PAIRS[stage](cfg)
    stages: dict[str, Callable[[RunContext], float]] = {
        "all": _all,
        "corpus": _corpus,
        "build": _build,
        "score": _score,
        "select": _select,
        "publish": _publish,
        "load": _load,
    }
    _check(cfg, stage)
    # Held from the start, so that a second run on the same registry learns of it at once and not after its own work.
    with registry_lock(cfg.paths.registry) if stage in ("all", "publish") else nullcontext():
        cfg = offered(cfg, cfg.target.folder(cfg.paths.cache))
        _check(cfg, stage)  # what was left out may be what a word names
        context = RunContext.open(cfg)
        for line in context.plan.lines():
            logger.info("%s", line)
        return stages[stage](context)


def _drift(cfg: RunConfig) -> float:
    folder = champion_folder(cfg)
    target = cfg.target.folder(cfg.paths.cache)
    out = folder.parent / REALIGN_FOLDER / "drift"
    report = run_drift(folder, target, target_digest(target), Path(cfg.drift.log), out, cfg.drift)
    return float(len(report.alarms))


def _rollback(cfg: RunConfig) -> float:
    version = roll_back(cfg.paths.registry, cfg.publish.name)
    logger.info("champion    %s again", cfg.paths.registry / cfg.publish.name / version)
    return 1.0


_ON_PAIRS: dict[str, Callable[[RunConfig], float]] = {"drift": _drift, "realign": run_realign, "rollback": _rollback}
"""What works on a published pair instead of a run's artifacts."""


def _check(cfg: RunConfig, stage: str) -> None:
    """Refuse what cannot be run, before anything is made for it.

    Raises:
        InputError: a word asks for what the other words do not give.
    """
    check_needed(cfg)
    if stage in ("all", "corpus", "build"):
        check_training(cfg)
    if stage == "load":
        check_load_draft(cfg)
    if stage in ("all", "score"):
        check_baseline(cfg)
    if stage in ("all", "select"):
        check_temperature(cfg.select, scored=cfg.score.temperatures)


def _all(context: RunContext) -> float:
    corpus = _timed("corpus", lambda: run_corpus(context))
    drafts = _timed("build", lambda: run_build(context, corpus))
    score = _timed("score", lambda: run_score(context, corpus, drafts))
    select = _timed("select", lambda: run_select(context, score))
    decision = read_decision(select)
    version = _timed("publish", lambda: run_publish(context, corpus, drafts, score, select))
    _show_summary(decision)
    _show_stages(version)
    logger.info("decision  %s: %s", decision.winner, decision.reason)
    logger.info("pair      %s (alias %s)", version, context.cfg.paths.registry / context.cfg.publish.name / CHAMPION)
    logger.info("report    %s and %s", score.path / TABLE_FILE, score.path / PLOT_FILE)
    return _speedup_of(decision)


def _corpus(context: RunContext) -> float:
    return float(run_corpus(context).metrics["response_tokens"])


def _build(context: RunContext) -> float:
    drafts = run_build(context, _corpus_for_build(context))
    found = [d.metrics["eval/acceptance"] for d in drafts.values() if "eval/acceptance" in d.metrics]
    return sum(found) / len(found) if found else 0.0


def _score(context: RunContext) -> float:
    cards = read_scorecards(_scored(context).path)
    return max(find_card(cards, arm).speedup.value for arm in {card.arm for card in cards})


def _select(context: RunContext) -> float:
    score = _existing(context, score_spec(context, *_built(context)), "score")
    decision = read_decision(run_select(context, score))
    _show_summary(decision)
    logger.info("decision  %s: %s", decision.winner, decision.reason)
    return _speedup_of(decision)


def _publish(context: RunContext) -> float:
    corpus, drafts = _built(context)
    score = _existing(context, score_spec(context, corpus, drafts), "score")
    select = _existing(context, select_spec(context, score), "select")
    run_publish(context, corpus, drafts, score, select)
    return _speedup_of(read_decision(select))


def _load(context: RunContext) -> float:
    corpus, drafts = _built(context)
    name = context.cfg.load.draft or _chosen(context, corpus, drafts)
    load = run_load(context, corpus, name, drafts[name])
    logger.info("report    %s and %s", load.path / LOAD_TABLE_FILE, load.path / LOAD_PLOT_FILE)
    return float(load.metrics["over_none"])


def _chosen(context: RunContext, corpus: Artifact, drafts: dict[str, Artifact]) -> str:
    """The draft that the selection chose.

    Raises:
        InputError: it chose none, or has not been run.
    """
    score = _existing(context, score_spec(context, corpus, drafts), "score")
    winner = read_decision(_existing(context, select_spec(context, score), "select")).winner
    if winner == BASELINE:
        raise InputError("the selection chose no draft", where="load.draft", mend="name one, as in load.draft=lookup")
    return winner


def _scored(context: RunContext) -> Artifact:
    return run_score(context, *_built(context))


def _corpus_for_build(context: RunContext) -> Artifact | None:
    """The corpus, when a draft is trained."""
    if any(draft.trained for draft in context.cfg.draft.values()):
        return _existing(context, corpus_spec(context), "corpus")
    return None


def _built(context: RunContext) -> tuple[Artifact, dict[str, Artifact]]:
    """Outputs of the first two stages."""
    corpus = _existing(context, corpus_spec(context), "corpus")
    return corpus, {name: _existing(context, draft_spec(context, name, corpus), "build") for name in context.cfg.draft}


def _existing(context: RunContext, spec: Spec, stage: str) -> Artifact:
    """An earlier stage's output.

    Raises:
        InputError: it is not there for this configuration.
    """
    found = context.store.find(spec)
    if found is None:
        mend = f"run `dspark {stage}` with the same overrides first, or `dspark` for all stages"
        if stage == "corpus" and context.cfg.budget.responses is None:
            # Other budgets are another plan, which measures this machine anew.
            mend += "; a corpus that another plan made is found by its number too, as in budget.responses=608"
        raise InputError(
            f"no output of the {stage} stage for this configuration", where=str(context.store.path(spec)), mend=mend
        )
    return found


def _speedup_of(decision: Decision) -> float:
    return next(c.speedup.value for c in decision.candidates if c.arm == decision.winner)


def _timed(stage: str, work: Callable[[], Output]) -> Output:
    """Run a stage and log what it took."""
    start = time.monotonic()
    output = work()
    logger.info("%-9s done in %.0f s", stage, time.monotonic() - start)
    return output


def _show_summary(decision: Decision) -> None:
    """The last table but one."""
    header = ("draft", "speedup", "tau", "draft MiB", "outcome")
    _show(header, summary(decision), title="measured speedup over target-only decoding")


def _show_stages(version: Path) -> None:
    """The last table: what the stages took, also those that were made by an earlier run."""
    if stages := read_stages(version):
        _show(*stage_rows(stages), title="what each stage took when it was made")


def _show(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> None:
    """A table on stderr, like all progress."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)
