"""Captured rounds under load: whether a load goes by them, and their buffers, seconds and engines.

On a GPU a round run kernel by kernel is nearly all launches (docs/gpu.md). All arms are captured or none is, so that
drafts are compared with the fastest target-only decoding there is.
"""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from inference.batch.costs import LoadCosts
from inference.batch.load import BATCH, Point
from inference.batch.load_figures import GENERATE, SCHEDULED, fixed_arm
from inference.block_length import BlockChoice, best_block
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.errors import InputError
from inference.feature_drafts.medusa import Config as Medusa
from inference.feature_networks import FeatureNetwork
from inference.feature_networks._checkpoint import CONFIG_FILE
from inference.graphed.arms import can_be_captured
from inference.graphed.asked import CAPTURED_ON
from inference.graphed.depths import Depths, FixedDepth, ScheduledDepth, load_seconds
from inference.graphed.engine import GraphedEngine, round_sizes
from inference.graphed.rounds import Rounds
from inference.graphed.target import ALIGNMENT
from inference.model import CausalModel
from inference.pair_files import read_draft_spec
from inference.request import Request
from inference.scoring import ScorePrompt, request_seed
from inference.statistics import BASELINE
from pipelines.captured import asks, obstacle
from pipelines.config import RunConfig
from pipelines.files import read_json, write_json
from pipelines.progress import tracked

logger = logging.getLogger(__name__)

CAPTURED_COSTS_FILE = "load_captured_costs.json"
# As in the costs of passes kernel by kernel.
_CONTEXT_TOKENS = 128
# A request that has ended is in one round more.
_SPARE_ROUNDS = 2

Seconds = dict[int, dict[int, float]]
"""Of captured rounds, by places and tokens proposed."""


def captures(cfg: RunConfig, name: str, draft_folder: Path) -> bool:
    """Whether a load of this draft asks for captured rounds and can go by them, targets apart.

    Raises:
        InputError: with `load.captured=on`, it cannot.
    """
    if not asks(cfg, cfg.load.captured):
        return False
    feature = read_draft_spec(draft_folder)["kind"] == FeatureDrafter.kind
    known = feature and read_json(draft_folder / CONFIG_FILE).get("kind") != Medusa.kind
    reason = obstacle(cfg, cfg.load.temperatures) or ("" if known else _unknown(name))
    if reason and cfg.load.captured == CAPTURED_ON:
        raise _refusal(reason)
    return not reason


def captured_load(cfg: RunConfig, name: str, make: "Callable[[], CapturedLoad]") -> "CapturedLoad | None":
    """The captured rounds of a load; None where it goes kernel by kernel, and one line says why where they were asked
    for.

    Args:
        cfg: of the run.
        name: of the draft.
        make: gives them.

    Raises:
        InputError: a draft that does not fit; with `load.captured=on`, what cannot be captured.
    """
    if not asks(cfg, cfg.load.captured):
        return None
    try:
        if reason := obstacle(cfg, cfg.load.temperatures):
            raise _NotCaptured(reason)
        made = make()
    except _NotCaptured as error:
        if cfg.load.captured == CAPTURED_ON:
            raise _refusal(str(error)) from None
        logger.info("no captured rounds: %s", error)
        return None
    logger.info("captured rounds: target-only decoding and %s, blocks of up to %d tokens", name, made.block)
    return made


def _refusal(reason: str) -> InputError:
    return InputError(reason, where="load.captured", mend="use auto or off")


def _unknown(name: str) -> str:
    return f"{name} is no draft whose rounds can be captured"


class _NotCaptured(Exception):
    """Why a target or a draft cannot be captured."""


class CapturedLoad:
    """Rounds of target-only decoding and of a draft, in every arithmetic that an arm of the load has.

    Args:
        cfg: of the run.
        name: of the draft.
        longest: most tokens that the scheduler may propose.
        precision: the arithmetic of an arm at a load.
        target: in one arithmetic.
        drafter: the draft for a target.

    Attributes:
        block: most tokens that a round proposes.

    Raises:
        InputError: a draft that does not fit.
    """

    def __init__(
        self,
        cfg: RunConfig,
        name: str,
        *,
        longest: int,
        precision: Callable[[str, Point], str],
        target: Callable[[str], CausalModel],
        drafter: Callable[[CausalModel], Drafter],
    ) -> None:
        self._cfg, self._name, self._precision = cfg, name, precision
        self._seconds: dict[str, Seconds] = {}
        self._rounds: dict[tuple[str, bool], Rounds] = {}  # by arithmetic, and whether they draft
        self._longest, self.block = longest, 0
        arms = self._arms()
        places = max(point.concurrency for _, point in arms)
        for key in dict.fromkeys(self._key(arm, point) for arm, point in arms):
            own = target(key[0])
            network = _network(name, drafter(own)) if key[1] else None
            block = 0 if network is None else min(network.block, max(longest, *cfg.load.lengths))
            self._rounds[key] = _rounds(cfg, own, network, block=block, places=places)
            self.block = max(self.block, block)

    # What the scheduler starts from

    def chosen(
        self, prompts: Sequence[ScorePrompt], *, max_new_tokens: int, stop_tokens: frozenset[int]
    ) -> BlockChoice:
        """Acceptance on validation prompts, decoded together with the longest block, and what it says of block lengths.

        Args:
            prompts: validation prompts, never held-out ones.
            max_new_tokens: per request.
            stop_tokens: end an answer.
        """
        name, rounds = next((name, rounds) for (name, drafts), rounds in self._rounds.items() if drafts)
        length = min(self._longest, rounds.block)
        engine, seed = GraphedEngine(rounds, FixedDepth(length)), self._cfg.seed
        handles = [
            engine.submit(
                prompt.tokens,
                Request(
                    settings=self._cfg.decode.settings(temperature),
                    max_new_tokens=max_new_tokens,
                    stop_tokens=stop_tokens,
                ),
                seed=request_seed(seed, prompt.id, temperature, self._name, "block"),
            )
            for prompt in prompts
            for temperature in self._cfg.load.temperatures
        ]
        while not engine.idle:
            engine.step()
        accepted, proposed = (
            [float(sum(counts)) for counts in zip(*columns, strict=True)]
            for columns in ([h.result.accepted for h in handles], [h.result.proposed for h in handles])
        )
        passes = self.passes(name)
        return best_block(accepted, proposed, 0.0, pass_seconds=lambda width: passes[width])

    def measure(self, folder: Path) -> None:
        """Time the draft's rounds of every length, for every number of places that the scheduler comes to; once, and
        read back after a kill.

        Args:
            folder: of the load.
        """
        path = folder / CAPTURED_COSTS_FILE
        if path.is_file():
            self._seconds = {
                name: {int(p): {int(n): float(s) for n, s in row.items()} for p, row in table.items()}
                for name, table in read_json(path).items()
            }
            return
        for name in sorted({self._precision(arm, point) for arm, point in self._arms() if arm == SCHEDULED}):
            rounds = self._rounds[name, True]
            places = self._places(name)
            logger.info("measuring captured rounds of %s requests in %s", ", ".join(map(str, places)), name)
            self._seconds[name] = load_seconds(
                rounds,
                places=places,
                lengths=range(min(self._longest, rounds.block) + 1),
                context=min(_CONTEXT_TOKENS, rounds.capacity // 2),
                sampled=max(self._cfg.load.temperatures) > 0.0,
            )
        write_json(path, self._seconds)

    def costs(self) -> dict[str, LoadCosts]:
        """What was measured, by arithmetic: a whole round is told as its pass, and its drafting as nothing."""
        return {
            name: LoadCosts(
                passes={p: {p * (1 + length): s for length, s in row.items()} for p, row in seconds.items()},
                drafts=dict.fromkeys(seconds, (0.0, 0.0)),
                spread={p: {p * (1 + length): 0.0 for length in row} for p, row in seconds.items()},
            )
            for name, seconds in self._seconds.items()
        }

    def passes(self, precision: str) -> Mapping[int, float]:
        """Seconds of a round of one request by tokens in its pass, in one arithmetic."""
        return {1 + length: seconds for length, seconds in self._seconds[precision][1].items()}

    # Engines

    def prepare(self, *, longest_prompt: int) -> None:
        """Capture all that a request may come to, so that nothing is captured while one waits.

        Args:
            longest_prompt: of any load, in tokens.
        """
        warm = [temperature > 0.0 for temperature in self._cfg.load.temperatures]
        for key, rounds in tracked(list(self._rounds.items()), "captured rounds", unit="kinds"):
            mine = [(arm, point) for arm, point in self._arms() if self._key(arm, point) == key]
            sizes = {size for _, point in mine for size in round_sizes(point.concurrency)}
            lengths = {n for arm, point in mine for n in self._depths(arm, point, rounds, ()).lengths}
            # Batches beside `generate` are greedy.
            sampled = {*warm, *(False for _, point in mine if point.kind == BATCH)}
            for each in sorted(sampled):
                rounds.prepare(sampled=each, places=sorted(sizes), blocks=sorted(lengths))
            rounds.prepare_prompts(longest_prompt, together=rounds.batch)

    def engine(self, arm: str, point: Point, *, conditional: Sequence[float]) -> GraphedEngine:
        """A new engine for one arm at a load; nobody else uses its rounds meanwhile.

        Args:
            arm: any but `generate`.
            point: the load.
            conditional: acceptance by position that the scheduler starts from.
        """
        rounds = self._rounds[self._key(arm, point)]
        # Moments of all tokens were kept of the last arm: a collection would hold up the next one at some round.
        gc.collect()
        return GraphedEngine(rounds, self._depths(arm, point, rounds, conditional), max_requests=point.concurrency)

    def _depths(self, arm: str, point: Point, rounds: Rounds, conditional: Sequence[float]) -> Depths:
        if arm == SCHEDULED:
            return ScheduledDepth(self._seconds[self._precision(arm, point)], conditional or (0.5,))
        lengths = {fixed_arm(length): length for length in self._cfg.load.lengths}
        return FixedDepth(min(lengths.get(arm, 0), rounds.block))

    def _arms(self) -> list[tuple[str, Point]]:
        load = self._cfg.load
        return [(arm, point) for point in load.points() for arm in load.arms(point) if arm != GENERATE]

    def _key(self, arm: str, point: Point) -> tuple[str, bool]:
        return self._precision(arm, point), arm != BASELINE

    def _places(self, precision: str) -> list[int]:
        """Numbers of places that rounds of the scheduler may have."""
        mine = [p for arm, p in self._arms() if arm == SCHEDULED and self._precision(arm, p) == precision]
        return sorted({size for point in mine for size in round_sizes(point.concurrency)})


def _network(name: str, drafter: Drafter) -> FeatureNetwork:
    if not isinstance(drafter, FeatureDrafter) or not can_be_captured(drafter):
        raise _NotCaptured(_unknown(name))
    return drafter.network


def _rounds(cfg: RunConfig, target: CausalModel, network: FeatureNetwork | None, *, block: int, places: int) -> Rounds:
    """Buffers for the longest prompt and its answer."""
    tokens = min(cfg.load.max_prompt_tokens + cfg.load.max_new_tokens, target.context_limit)
    capacity = -(-(tokens + _SPARE_ROUNDS * (block + 1)) // ALIGNMENT) * ALIGNMENT
    try:
        return Rounds(target, network, block=block, batch=places, capacity=capacity)
    except InputError as error:
        raise _NotCaptured(error.what) from None
