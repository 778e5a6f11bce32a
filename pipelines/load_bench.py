"""What a load runs on: targets, drafters, prompts, and the costs and chances its scheduler starts from.

Loads and measures once; which load runs when, and what is written of it, is `pipelines.load`.
"""

import dataclasses
import logging
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from inference.batch.copies import drafter_maker
from inference.batch.costs import LoadCosts, measure_load_costs
from inference.batch.drafting import draft_group
from inference.batch.engine import BatchEngine
from inference.batch.load import (
    BATCH,
    CLOSED,
    POISSON,
    Asked,
    Point,
    Trace,
)
from inference.batch.load_figures import (
    GENERATE,
    SCHEDULED,
    fixed_arm,
)
from inference.batch.plain import plain_generate
from inference.block_length import BlockChoice, choose_block
from inference.costs import interpolated
from inference.device_profile import WIDTHS
from inference.drafters import Drafter, LoadContext, load_drafter
from inference.drafters.none import NoDrafter
from inference.driving import closed_loop, poisson_arrivals, timed_load
from inference.graphed.engine import GraphedEngine
from inference.lookahead import BlockConfig, Chances, Lookahead, Measured
from inference.lookahead.fixed import FixedLookahead
from inference.lookahead.scheduled import Config as ScheduledConfig
from inference.model import CausalModel
from inference.request import Request
from inference.scoring import Arm, ScorePrompt, request_seed
from inference.statistics import BASELINE
from inference.target import stop_tokens
from pipelines.artifacts import Artifact
from pipelines.build import DRAFT_FOLDER
from pipelines.calibrate import calibrate
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.corpus import read_prompts
from pipelines.files import read_json, write_json
from pipelines.load_captured import CapturedLoad, captured_load
from pipelines.plan import MEAN_PROMPT_TOKENS
from pipelines.score import score_prompts
from pipelines.score_plan import by_domain, round_robin

logger = logging.getLogger(__name__)

LOAD_PLAN_FILE = "load_plan.json"
LOAD_COSTS_FILE = "load_costs.json"
_BLOCK_TOKENS = 32
_WARM_UP_TOKENS = 4
# A draft verifies a few tokens for every request: the width at which its target's arithmetic is chosen, per request.
_DRAFT_WIDTH = 3


def load_policy(cfg: RunConfig) -> BlockConfig:
    """The run's own scheduler, or one as it comes where the run goes by another policy."""
    return cfg.lookahead if isinstance(cfg.lookahead, ScheduledConfig) else ScheduledConfig()


class Bench:
    """Targets, drafters and prompts of a load, and what the scheduler starts from.

    Attributes:
        cfg: of the run.
        name: of the draft.
        costs: of rounds by number of requests, in every arithmetic that the scheduler has; see `CapturedLoad.costs` for
            those of captured rounds.
    """

    def __init__(self, context: RunContext, corpus: Artifact, name: str, draft: Artifact, folder: Path) -> None:
        self.context, self.cfg, self.name, self._draft = context, context.cfg, name, draft
        self._targets: dict[str, CausalModel] = {}
        self._makers: dict[str, Callable[[], Drafter]] = {}
        target = self.target(context.plan.block_precision)
        self.stops = stop_tokens(target)
        prompts = score_prompts(read_prompts(corpus.path), target, self.cfg.load.max_prompt_tokens)
        self._heldout = round_robin(by_domain(prompts["heldout"], self.cfg.seed), len(prompts["heldout"]))
        policy = load_policy(self.cfg)
        self.longest = policy.tokens or policy.longest_auto
        self._rounds = captured_load(self.cfg, name, self._captured)
        if self._rounds is not None:
            self._rounds.measure(folder)
        self._choice, self._chances = self._planned(prompts["validation"], folder)
        self.costs = self._measured_costs(folder) if self._rounds is None else self._rounds.costs()

    @property
    def captured(self) -> bool:
        """Whether all arms but `generate` go by captured rounds."""
        return self._rounds is not None

    def _captured(self) -> CapturedLoad:
        return CapturedLoad(
            self.cfg,
            self.name,
            longest=self.longest,
            precision=self.precision,
            target=self.target,
            drafter=lambda target: self._maker(self.name, target)(),
        )

    def target(self, precision: str) -> CausalModel:
        """The target in one arithmetic."""
        if precision not in self._targets:
            self._targets[precision] = self.cfg.target.load(self.cfg.paths.cache, precision=precision)
        return self._targets[precision]

    def precision(self, arm: str, point: Point) -> str:
        """The arithmetic in which a typical request of this load takes least, by the device profile: its prompt, read
        in wide passes, and its share of the passes that write its answer."""
        if self.cfg.target.precision != "auto":
            return str(self.cfg.target.precision)
        passes = self.context.plan.profile.passes
        each = 1 if arm in (BASELINE, GENERATE) else _DRAFT_WIDTH
        widest = max(WIDTHS)

        def seconds(name: str) -> float:
            prompt = passes[name][widest] / widest * MEAN_PROMPT_TOKENS
            answer = interpolated(passes[name], each * point.concurrency) / point.concurrency
            return prompt + self.cfg.load.max_new_tokens * answer

        return min(passes, key=seconds)

    def measured(self, precision: str) -> Measured:
        """What the scheduler starts from."""
        passes = self.context.plan.profile.passes[precision] if self._rounds is None else self._rounds.passes(precision)
        return self._choice.measured(passes, self._chances)

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
        engine = self._engine(arm, point)
        if point.kind == CLOSED:
            return closed_loop(engine, asked, concurrency=point.concurrency)
        if point.kind == BATCH:
            return timed_load(engine, asked, [0.0] * len(asked))
        seed = request_seed(self.cfg.seed, "arrivals", block)
        return timed_load(engine, asked, poisson_arrivals(len(asked), rate=rate, seed=seed))

    def _engine(self, arm: str, point: Point) -> BatchEngine | GraphedEngine:
        """A new one, for an arm at a load."""
        if self._rounds is not None:
            return self._rounds.engine(arm, point, conditional=self.conditional)
        target = self.target(self.precision(arm, point))
        return BatchEngine(
            target,
            self._maker(arm, target),
            self._lookahead(arm, target),
            max_requests=point.concurrency,
            costs=self.costs.get(target.precision) if arm == SCHEDULED else None,
        )

    def warm_up(self) -> None:
        """Let every arm decode a little in every arithmetic it will have, so that nothing is measured cold; what goes
        by captured rounds is captured."""
        load = self.cfg.load
        if self._rounds is not None:
            self._rounds.prepare(longest_prompt=max(prompt.tokens.shape[0] for prompt in self._heldout))
        seen = set()
        for point in load.points():
            for arm in load.arms(point):
                precision = self.precision(arm, point)
                if (arm, precision) in seen or (self._rounds is not None and arm != GENERATE):
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
            return load_policy(self.cfg).build(self.longest, (), self.measured(target.precision))
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
        groups = by_domain(validation, self.cfg.seed)
        if self._rounds is None:
            choice, chances = self._decoded(groups, folder)
        else:
            # Its scheduler goes by what is accepted, not by confidences.
            chances = Chances()
            choice = self._rounds.chosen(
                round_robin(groups, self.cfg.score.validation_prompts),
                max_new_tokens=min(_BLOCK_TOKENS, self.cfg.load.max_new_tokens),
                stop_tokens=self.stops,
            )
        write_json(path, {"choice": asdict(choice), "chances": chances.to_json()})
        return choice, chances

    def _decoded(self, groups: list[list[ScorePrompt]], folder: Path) -> tuple[BlockChoice, Chances]:
        """Validation prompts decoded kernel by kernel, by domain."""
        cfg, plan = self.cfg, self.context.plan
        target = self.target(plan.block_precision)
        arm = Arm(self.name, target, self._maker(self.name, target)(), FixedLookahead(0))
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
        return choice, chances
