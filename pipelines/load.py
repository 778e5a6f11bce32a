"""The load benchmark: the batch engine under closed loops and Poisson arrivals, for one draft, on held-out prompts.

Target-only decoding, every fixed length and the scheduler run on the same requests of a block, in shuffled order, and
every load gets one block before any gets its second, so that a machine that is slower for a while is slower for all.
Runs are appended block by block, and a killed load goes on after its last whole block. Decides nothing.
"""

import dataclasses
import json
import logging
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inference.batch.copies import drafter_maker
from inference.batch.costs import LoadCosts, measure_load_costs
from inference.batch.drafting import draft_group
from inference.batch.engine import BatchEngine
from inference.batch.load import (
    BATCH,
    CLOSED,
    POISSON,
    Asked,
    LoadRun,
    Point,
    Trace,
    closed_loop,
    poisson_arrivals,
    timed_load,
)
from inference.batch.load_figures import (
    GENERATE,
    SCHEDULED,
    LoadFigure,
    claims,
    fixed_arm,
    foretold,
    load_figures,
)
from inference.batch.plain import plain_generate
from inference.costs import interpolated
from inference.decoder import Request
from inference.drafters import Drafter, LoadContext, load_drafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.lookahead import BlockConfig, Chances, Lookahead, Measured
from inference.lookahead.fixed import FixedLookahead
from inference.lookahead.scheduled import Config as ScheduledConfig
from inference.model import CausalModel
from inference.scoring import Arm, BlockChoice, ScorePrompt, choose_block, explain_mismatch, request_seed
from inference.statistics import BASELINE
from inference.target import stop_tokens
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.build import DRAFT_FOLDER
from pipelines.calibrate import calibrate
from pipelines.composition import nearest
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.corpus import read_prompts
from pipelines.errors import StageFailed
from pipelines.files import read_json, write_json, write_text
from pipelines.load_report import claim_lines, load_markdown, load_plot, point_name
from pipelines.progress import tracked
from pipelines.score import score_prompts
from pipelines.score_plan import by_domain, round_robin

logger = logging.getLogger(__name__)

RUNS_FILE = "records.jsonl"
LOAD_PLAN_FILE = "load_plan.json"
LOAD_COSTS_FILE = "load_costs.json"
LOAD_FILE = "load.json"
LOAD_TABLE_FILE = "load.md"
LOAD_PLOT_FILE = "load.png"
_FEWEST_BLOCKS = 2
_BLOCK_TOKENS = 32
_WARM_UP_TOKENS = 4
# A draft verifies a few tokens for every request: the width at which its target's arithmetic is chosen, per request.
_DRAFT_WIDTH = 3


@dataclass(kw_only=True)
class LoadConfig:
    """What load is put on the engine.

    Attributes:
        draft: one of the drafts; empty for the one that the selection chose.
        concurrencies: requests kept running in a closed loop.
        lengths: fixed lengths that the scheduler is compared with, in tokens.
        temperatures: each request gets one of them, drawn by prompt and block; several make a mixed load. Above 0,
            arms write different answers to the same request, so their ratios need more blocks.
        max_new_tokens: longest answer, in tokens.
        max_prompt_tokens: longer held-out prompts are left out, in tokens.
        requests: fewest requests of a block; a closed loop never gets fewer than two for each that is kept running.
        poisson_shares: arrivals a second over what target-only decoding serves in its best closed loop of the first
            block; empty for no Poisson loads.
        poisson_requests: requests of a block of arrivals.
        generate: batch sizes at which transformers' `generate` and the engine's target-only decoding answer the same
            requests; empty for none.
        minutes: how long it may take; a number of blocks follows from it once every load has had its first.
        blocks: of each load; 0 for as many as the minutes allow, two at least.
    """

    draft: str = ""
    concurrencies: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    lengths: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    max_new_tokens: int = 48
    max_prompt_tokens: int = 384
    requests: int = 8
    poisson_shares: list[float] = field(default_factory=lambda: [0.5, 0.9])
    poisson_requests: int = 32
    generate: list[int] = field(default_factory=lambda: [8, 32])
    minutes: float = 60.0
    blocks: int = 0

    def __post_init__(self) -> None:
        if not self.concurrencies or min([*self.concurrencies, *self.generate]) < 1:
            raise ValueError("load.concurrencies and load.generate count requests; give at least one, and none below 1")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"load.lengths is {self.lengths}; give at least one, none below 1")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"load.temperatures is {self.temperatures}; give at least one, none below 0")
        if any(not share > 0 for share in self.poisson_shares):
            raise ValueError(f"load.poisson_shares is {self.poisson_shares}; use shares above 0, or [] for none")
        counts = ("max_new_tokens", "max_prompt_tokens", "requests", "poisson_requests")
        if wrong := [name for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"load.{wrong[0]} is {getattr(self, wrong[0])}; use at least 1")
        if not self.minutes > 0 or self.blocks < 0:
            raise ValueError("load needs minutes above 0 and blocks of at least 0")

    def points(self) -> list[Point]:
        """The loads, in the order in which they run: arrivals last, since their rate comes from the closed loops."""
        most = max(self.concurrencies)
        closed = [Point(CLOSED, concurrency) for concurrency in dict.fromkeys(self.concurrencies)]
        batches = [Point(BATCH, size) for size in dict.fromkeys(self.generate)]
        return [*closed, *batches, *(Point(POISSON, most, share) for share in dict.fromkeys(self.poisson_shares))]

    def arms(self, point: Point) -> list[str]:
        """The arms that run at a load."""
        if point.kind == BATCH:
            return [BASELINE, GENERATE]
        return [BASELINE, *(fixed_arm(length) for length in sorted(set(self.lengths))), SCHEDULED]


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
    """What a load is made from; the device is part of it, since speed is."""
    cfg, plan = context.cfg, context.plan
    return Spec(
        "load",
        config={
            "load": dataclasses.replace(cfg.load, draft=name),
            "decode": dataclasses.replace(cfg.decode, max_new_tokens=cfg.load.max_new_tokens),
            "lookahead": _policy(cfg),
            "validation_prompts": cfg.score.validation_prompts,
            "calibration_prompts": cfg.score.calibration_prompts,
            "device": plan.device,
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
    bench = _Bench(context, corpus, name, draft, work.folder)
    bench.warm_up()
    runs = _measure(bench, work.folder / RUNS_FILE)
    figures = load_figures(runs, seed=context.cfg.seed)
    wrong = sum(f.unexplained for f in figures if f.arm != GENERATE)
    if wrong:
        raise LoadError(f"{wrong} greedy outputs under load differ where the target has no near-tie: not lossless")
    _write_results(work, bench, figures)


def _policy(cfg: RunConfig) -> BlockConfig:
    """The run's own scheduler, or one as it comes where the run goes by another policy."""
    return cfg.lookahead if isinstance(cfg.lookahead, ScheduledConfig) else ScheduledConfig()


class _Bench:
    """Targets, drafters and prompts of a load, and what the scheduler starts from.

    Attributes:
        cfg: of the run.
        name: of the draft.
        costs: of rounds by number of requests, in every arithmetic that the scheduler has.
    """

    def __init__(self, context: RunContext, corpus: Artifact, name: str, draft: Artifact, folder: Path) -> None:
        self.context, self.cfg, self.name, self._draft = context, context.cfg, name, draft
        self._targets: dict[str, CausalModel] = {}
        self._makers: dict[str, Callable[[], Drafter]] = {}
        target = self.target(context.plan.block_precision)
        self.stops = stop_tokens(target)
        prompts = score_prompts(read_prompts(corpus.path), target, self.cfg.load.max_prompt_tokens)
        self._heldout = round_robin(by_domain(prompts["heldout"], self.cfg.seed), len(prompts["heldout"]))
        policy = _policy(self.cfg)
        self.longest = policy.tokens or policy.longest_auto
        self._choice, self._chances = self._planned(prompts["validation"], folder)
        self.costs = self._measured_costs(folder)

    def target(self, precision: str) -> CausalModel:
        """The target in one arithmetic."""
        if precision not in self._targets:
            self._targets[precision] = self.cfg.target.load(self.cfg.paths.cache, precision=precision)
        return self._targets[precision]

    def precision(self, arm: str, point: Point) -> str:
        """The arithmetic that the device profile gives an arm: the fastest for the tokens of its usual pass."""
        if self.cfg.target.precision != "auto":
            return str(self.cfg.target.precision)
        passes = self.context.plan.profile.passes
        width = point.concurrency * (1 if arm in (BASELINE, GENERATE) else _DRAFT_WIDTH)
        return min(passes, key=lambda name: interpolated(passes[name], width))

    def measured(self, precision: str) -> Measured:
        """What the scheduler starts from."""
        return self._choice.measured(self.context.plan.profile.passes[precision], self._chances)

    def asked(self, point: Point, block: int) -> list[Asked]:
        """The requests of a block: prompts in a seeded order, domains in turn; blocks follow each other in it."""
        load = self.cfg.load
        each = load.poisson_requests if point.kind == POISSON else max(load.requests, 2 * point.concurrency)
        count = point.concurrency if point.kind == BATCH else each
        chosen = [self._heldout[(block * each + i) % len(self._heldout)] for i in range(count)]
        return [self._asked(prompt, block, greedy=point.kind == BATCH) for prompt in chosen]

    def run(self, arm: str, point: Point, block: int, *, rate: float) -> tuple[Trace, list[list[int]]]:
        """One arm on one block; `rate` is that of the arrivals."""
        target = self.target(self.precision(arm, point))
        asked = self.asked(point, block)
        if arm == GENERATE:
            return plain_generate(target, asked)
        lookahead = self._lookahead(arm, target)
        engine = BatchEngine(
            target,
            self._maker(arm, target),
            lookahead,
            max_requests=point.concurrency,
            costs=self.costs.get(target.precision) if arm == SCHEDULED else None,
        )
        if point.kind == CLOSED:
            return closed_loop(engine, asked, concurrency=point.concurrency)
        if point.kind == BATCH:
            return timed_load(engine, asked, [0.0] * len(asked))
        seed = request_seed(self.cfg.seed, "arrivals", block)
        return timed_load(engine, asked, poisson_arrivals(len(asked), rate=rate, seed=seed))

    def warm_up(self) -> None:
        """Let every arm decode a little in every arithmetic it will have, so that nothing is measured cold."""
        load = self.cfg.load
        seen = set()
        for point in load.points():
            for arm in load.arms(point):
                precision = self.precision(arm, point)
                if (arm, precision) in seen:
                    continue
                seen.add((arm, precision))
                target = self.target(precision)
                asked = [self._short(one) for one in self.asked(Point(BATCH, 2), 0)]
                if arm == GENERATE:
                    plain_generate(target, asked)
                else:
                    lookahead = self._lookahead(arm, target)
                    engine = BatchEngine(target, self._maker(arm, target), lookahead, max_requests=2)
                    closed_loop(engine, asked, concurrency=2)

    def _asked(self, prompt: ScorePrompt, block: int, *, greedy: bool) -> Asked:
        load, seed = self.cfg.load, self.cfg.seed
        draw = random.Random(request_seed(seed, prompt.id, block, "temperature"))
        temperature = 0.0 if greedy else draw.choice(load.temperatures)
        return Asked(
            prompt_id=prompt.id,
            domain=prompt.domain,
            prompt=prompt.tokens,
            request=Request(
                settings=self.cfg.decode.settings(temperature),
                max_new_tokens=load.max_new_tokens,
                stop_tokens=self.stops,
            ),
            seed=request_seed(seed, prompt.id, temperature, block),
        )

    @staticmethod
    def _short(asked: Asked) -> Asked:
        request = dataclasses.replace(asked.request, max_new_tokens=_WARM_UP_TOKENS)
        return dataclasses.replace(asked, request=request)

    def _lookahead(self, arm: str, target: CausalModel) -> Lookahead:
        if arm == SCHEDULED:
            return _policy(self.cfg).build(self.longest, (), self.measured(target.precision))
        lengths = {fixed_arm(length): length for length in self.cfg.load.lengths}
        return FixedLookahead(lengths.get(arm, 0))

    def _maker(self, arm: str, target: CausalModel) -> Callable[[], Drafter]:
        """Drafters of one arithmetic share their weights, whatever the arm."""
        if arm == BASELINE:
            return NoDrafter
        if target.precision not in self._makers:
            self._makers[target.precision] = drafter_maker(self._loaded(target))
        return self._makers[target.precision]

    def _measured_costs(self, folder: Path) -> dict[str, LoadCosts]:
        """Costs by number of requests in every arithmetic that the scheduler will have, measured once."""
        path = folder / LOAD_COSTS_FILE
        if path.is_file():
            return {name: LoadCosts.from_json(data, where=str(path)) for name, data in read_json(path).items()}
        counts = sorted({point.concurrency for point in self.cfg.load.points()})
        names = {self.precision(SCHEDULED, p) for p in self.cfg.load.points() if p.kind != BATCH}
        costs = {}
        for name in sorted(names):
            target = self.target(name)
            maker = self._maker(SCHEDULED, target)
            logger.info("measuring passes and drafting for %s requests in %s", ", ".join(map(str, counts)), name)
            costs[name] = measure_load_costs(
                target,
                lambda count, maker=maker, target=target: draft_group(  # type: ignore[misc]
                    maker, max_requests=count, max_tokens=target.context_limit
                ),
                requests=counts,
                longest=self.longest,
            )
        write_json(path, {name: found.to_json() for name, found in costs.items()})
        return costs

    @property
    def conditional(self) -> list[float]:
        """Acceptance by position on the validation prompts."""
        return self._choice.conditional

    def _loaded(self, target: CausalModel) -> Drafter:
        return load_drafter(
            LoadContext(
                folder=self._draft.path / DRAFT_FOLDER,
                target_folder=self.context.target_folder,
                target=target,
                precision=target.precision,
                device=target.device,
            )
        )

    def _planned(self, validation: list[ScorePrompt], folder: Path) -> tuple[BlockChoice, Chances]:
        """Costs and chances of the draft, measured on validation prompts once and read back after a kill."""
        path = folder / LOAD_PLAN_FILE
        if path.is_file():
            data = read_json(path)
            return BlockChoice(**data["choice"]), Chances.from_json(data["chances"], where=str(path))
        cfg, plan = self.cfg, self.context.plan
        target = self.target(plan.block_precision)
        arm = Arm(self.name, target, self._maker(self.name, target)(), FixedLookahead(0))
        groups = by_domain(validation, cfg.seed)
        settings = [cfg.decode.settings(t) for t in cfg.load.temperatures]
        choice = choose_block(
            arm,
            round_robin(groups, cfg.score.validation_prompts),
            longest=self.longest,
            settings=settings,
            max_new_tokens=min(_BLOCK_TOKENS, cfg.load.max_new_tokens),
            stop_tokens=self.stops,
            pass_seconds=lambda width: plan.profile.pass_seconds(plan.block_precision, width),
            seed=cfg.seed,
        )
        chances = calibrate(
            arm,
            round_robin(groups, cfg.score.calibration_prompts),
            tokens=self.longest,
            settings=settings,
            max_new_tokens=cfg.load.max_new_tokens,
            stop_tokens=self.stops,
            seed=cfg.seed,
            folder=folder,
        )
        write_json(path, {"choice": asdict(choice), "chances": chances.to_json()})
        return choice, chances


def _measure(bench: _Bench, path: Path) -> list[LoadRun]:
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


def _block(bench: _Bench, point: Point, block: int, *, rate: float) -> list[LoadRun]:
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
    bench: _Bench, arm: str, point: Point, block: int, trace: Trace, answers: dict[str, list[list[int]]]
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


def _write_results(work: Work, bench: _Bench, figures: list[LoadFigure]) -> None:
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
        "measured": {name: bench.measured(name).to_json() for name in dict.fromkeys(drafting.values())},
        "costs": {name: costs.to_json() for name, costs in bench.costs.items()},
        "foretold": {str(c): {"tokens": tokens, "over_none": gain} for c, (tokens, gain) in hoped.items()},
        "claims": asdict(found),
        "figures": [figure.to_dict() for figure in figures],
    }
    write_text(work.folder / LOAD_FILE, json.dumps(data, indent=1) + "\n")
    for line in claim_lines(figures, found):
        logger.info("%s", line)
    write_text(work.folder / LOAD_TABLE_FILE, load_markdown(figures, found, hoped, bench.costs, draft=bench.name))
    load_plot(figures, work.folder / LOAD_PLOT_FILE)
    mine = [f for f in figures if f.arm == SCHEDULED and f.point.kind == CLOSED]
    work.metrics["over_none"] = sum(f.over_none.value for f in mine) / len(mine)
    work.metrics["over_fixed"] = {str(f.point.concurrency): f.over_fixed.value for f in mine if f.over_fixed}
    work.metrics["claims"] = asdict(found)
