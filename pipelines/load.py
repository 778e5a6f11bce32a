"""The load benchmark: many requests under closed loops and Poisson arrivals, for one draft, on held-out prompts, in the
batch engine or by captured rounds.

Target-only decoding, every fixed length and the scheduler run on the same requests of a block, in shuffled order, and
every load gets one block before any gets its second, so that a machine that is slower for a while is slower for all.
Runs are appended block by block, and a killed load goes on after its last whole block. Decides nothing.
"""

import dataclasses
import json
import logging
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.batch.load import (
    CLOSED,
    POISSON,
    LoadRun,
    Point,
    Trace,
)
from inference.batch.load_figures import (
    GENERATE,
    SCHEDULED,
    LoadFigure,
    claims,
    foretold,
    load_figures,
)
from inference.errors import InputError
from inference.graphed.asked import CAPTURED_OFF
from inference.scoring import explain_mismatch, request_seed
from inference.statistics import BASELINE
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.build import DRAFT_FOLDER
from pipelines.composition import nearest
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.errors import StageFailed
from pipelines.files import write_text
from pipelines.load_bench import Bench, load_policy
from pipelines.load_captured import captures
from pipelines.load_report import claim_lines, load_markdown, load_plot, point_name
from pipelines.progress import tracked
from pipelines.stage_config import LoadConfig

logger = logging.getLogger(__name__)

RUNS_FILE = "records.jsonl"
LOAD_FILE = "load.json"
LOAD_TABLE_FILE = "load.md"
LOAD_PLOT_FILE = "load.png"
_FEWEST_BLOCKS = 2


class LoadError(StageFailed):
    """Greedy output under load that rounding does not explain: decoding was not lossless."""


def check_load_draft(cfg: RunConfig) -> None:
    """Refuse a draft that is not in the list, or that proposes nothing, before anything is made for it.

    Raises:
        InputError: it is not one that can be put under load.
    """
    name = cfg.load.draft
    if name and name not in cfg.draft:
        known = [other for other in cfg.draft if other != BASELINE]
        mend = nearest(name, known) or f"drafts of this run are {', '.join(known) or 'none at all'}"
        raise InputError(f"no draft {name!r} in the list", where="load.draft", mend=mend)
    if name and cfg.draft[name].kind == BASELINE:
        raise InputError(
            "target-only decoding is part of every load",
            where="load.draft",
            mend="name a draft, or leave it empty for the one that the selection chose",
        )


def load_spec(context: RunContext, corpus: Artifact, name: str, draft: Artifact) -> Spec:
    """What a load is made from; the device is part of it, since speed is, and whether it goes by captured rounds, which
    only a target without them can still change.

    Raises:
        InputError: with `load.captured=on`, a draft that cannot.
    """
    cfg, plan = context.cfg, context.plan
    captured = captures(cfg, name, draft.path / DRAFT_FOLDER)
    asked = cfg.load.captured if captured else CAPTURED_OFF
    return Spec(
        "load",
        config={
            "load": dataclasses.replace(cfg.load, draft=name, captured=asked),
            "decode": dataclasses.replace(cfg.decode, max_new_tokens=cfg.load.max_new_tokens),
            "lookahead": load_policy(cfg),
            "validation_prompts": cfg.score.validation_prompts,
            "calibration_prompts": cfg.score.calibration_prompts,
            "device": plan.device,
            "captured": captured,
            "precision": {"fixed": cfg.target.precision, "block": plan.block_precision},
        },
        inputs={"target": context.target_digest, "corpus": corpus.digest, "draft": draft.digest},
        seed=cfg.seed,
    )


def run_load(context: RunContext, corpus: Artifact, name: str, draft: Artifact) -> Artifact:
    """Put one draft under load, or find the load.

    Raises:
        InputError: no held-out or validation prompt, a draft that does not fit, or a target whose requests cannot share
            a pass.
        LoadError: decoding was not lossless.
    """
    return context.store.obtain(
        load_spec(context, corpus, name, draft), make=lambda work: _make(context, corpus, name, draft, work)
    )


def read_runs(path: Path) -> list[LoadRun]:
    """Runs of a load, a torn last line left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # split before decoding: a torn line may end inside a character
    return [LoadRun.from_json(line.decode("utf-8")) for line in lines[:-1] if line]


def _make(context: RunContext, corpus: Artifact, name: str, draft: Artifact, work: Work) -> None:
    bench = Bench(context, corpus, name, draft, work.folder)
    bench.warm_up()
    runs = _measure(bench, work.folder / RUNS_FILE)
    figures = load_figures(runs, seed=context.cfg.seed)
    wrong = sum(f.unexplained for f in figures if f.arm != GENERATE)
    if wrong:
        raise LoadError(f"{wrong} greedy outputs under load differ where the target has no near-tie: not lossless")
    _write_results(work, bench, figures)


def _measure(bench: Bench, path: Path) -> list[LoadRun]:
    """Run what has no whole block yet, appending all arms of a block at once; returns all runs."""
    load = bench.cfg.load
    points = load.points()
    runs = whole_blocks(read_runs(path), load)
    write_text(path, "".join(run.to_json() + "\n" for run in runs))  # drops what was torn
    with path.open("a", encoding="utf-8") as stream:

        def work(todo: list[tuple[Point, int]], title: str) -> None:
            done = {(run.point, run.block) for run in runs}
            for point, block in tracked([one for one in todo if one not in done], title, unit="blocks"):
                new = _block(bench, point, block, rate=arrival_rate(runs, point))
                stream.write("".join(run.to_json() + "\n" for run in new))
                stream.flush()
                runs.extend(new)

        work([(point, 0) for point in points], "load, first blocks")
        count = num_blocks(runs, load)
        logger.info("load: %d blocks of each of %d loads", count, len(points))
        work([(point, block) for block in range(1, count) for point in points], "load")
    return runs


def whole_blocks(runs: list[LoadRun], load: LoadConfig) -> list[LoadRun]:
    """Leave out blocks that lack an arm: a kill or a full disk may have cut the last one anywhere."""
    arms: dict[tuple[Point, int], set[str]] = {}
    for run in runs:
        arms.setdefault((run.point, run.block), set()).add(run.arm)
    return [run for run in runs if arms[run.point, run.block] == set(load.arms(run.point))]


def num_blocks(runs: list[LoadRun], load: LoadConfig) -> int:
    """How many blocks of each load fit the minutes, by what the first ones took; the same after every kill."""
    if load.blocks:
        return load.blocks
    seconds = sum(run.trace.elapsed for run in runs if run.block == 0)
    return max(_FEWEST_BLOCKS, int(load.minutes * 60 / seconds))


def arrival_rate(runs: list[LoadRun], point: Point) -> float:
    """Requests a second of a Poisson load: its share of what target-only decoding served in its best first closed loop.

    0 for other loads, which have none.
    """
    if point.kind != POISSON:
        return 0.0
    mine = [run.trace for run in runs if (run.arm, run.block, run.point.kind) == (BASELINE, 0, CLOSED)]
    tokens, requests = sum(one.tokens for trace in mine for one in trace.served), sum(len(t.served) for t in mine)
    return point.share * max(trace.window_tokens / trace.window for trace in mine) * requests / tokens


def _block(bench: Bench, point: Point, block: int, *, rate: float) -> list[LoadRun]:
    """All arms on one block, in shuffled order; greedy answers are compared with the baseline's afterwards."""
    arms = bench.cfg.load.arms(point)
    order = list(range(len(arms)))
    random.Random(request_seed(bench.cfg.seed, *asdict(point).values(), block, "order")).shuffle(order)
    traces: dict[str, Trace] = {}
    answers: dict[str, list[list[int]]] = {}
    for index in order:
        traces[arms[index]], answers[arms[index]] = bench.run(arms[index], point, block, rate=rate)
    speeds = ", ".join(f"{arm} {traces[arm].window_tokens / traces[arm].window:.1f}" for arm in arms)
    logger.info("%s, block %d, tokens/s: %s", point_name(point), block, speeds)
    return [
        LoadRun(
            arm=arm,
            point=point,
            block=block,
            order=order.index(index),
            precision=bench.precision(arm, point),
            trace=_compared(bench, arm, point, block, traces[arm], answers),
        )
        for index, arm in enumerate(arms)
    ]


def _compared(
    bench: Bench, arm: str, point: Point, block: int, trace: Trace, answers: dict[str, list[list[int]]]
) -> Trace:
    """The trace, with a word on every greedy answer that left the baseline's."""
    served = [
        dataclasses.replace(
            one,
            mismatch=explain_mismatch(
                bench.target(bench.precision(arm, point)),
                asked.prompt,
                tokens,
                reference,
                reference_precision=bench.precision(BASELINE, point),
            )
            if asked.request.settings.greedy
            else None,
        )
        for one, asked, tokens, reference in zip(
            trace.served, bench.asked(point, block), answers[arm], answers[BASELINE], strict=True
        )
    ]
    return dataclasses.replace(trace, served=served)


def _write_results(work: Work, bench: Bench, figures: list[LoadFigure]) -> None:
    """Figures as data, page and picture; the summary goes into the manifest."""
    load = bench.cfg.load
    drafting = {p.concurrency: bench.precision(SCHEDULED, p) for p in load.points() if p.kind == CLOSED}
    hoped = {
        concurrency: foretold(bench.conditional, bench.costs[precision], concurrency=concurrency, longest=bench.longest)
        for concurrency, precision in drafting.items()
    }
    found = claims(figures)
    data: dict[str, Any] = {
        "seed": bench.cfg.seed,
        "draft": bench.name,
        "device": bench.context.plan.device,
        "captured": bench.captured,
        "measured": {name: bench.measured(name).to_json() for name in dict.fromkeys(drafting.values())},
        "costs": {name: costs.to_json() for name, costs in bench.costs.items()},
        "foretold": {str(c): {"tokens": tokens, "over_none": gain} for c, (tokens, gain) in hoped.items()},
        "claims": asdict(found),
        "figures": [figure.to_dict() for figure in figures],
    }
    write_text(work.folder / LOAD_FILE, json.dumps(data, indent=1) + "\n")
    for line in claim_lines(figures, found):
        logger.info("%s", line)
    page = load_markdown(figures, found, hoped, bench.costs, draft=bench.name, captured=bench.captured)
    write_text(work.folder / LOAD_TABLE_FILE, page)
    load_plot(figures, work.folder / LOAD_PLOT_FILE)
    mine = [f for f in figures if f.arm == SCHEDULED and f.point.kind == CLOSED]
    work.metrics["over_none"] = sum(f.over_none.value for f in mine) / len(mine)
    work.metrics["over_fixed"] = {str(f.point.concurrency): f.over_fixed.value for f in mine if f.over_fixed}
    work.metrics["claims"] = asdict(found)
