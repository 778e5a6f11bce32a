"""From the runs of a load to its figures: throughput, ratios to other arms on the same requests, latencies.

Blocks of requests are what is resampled: within a block every arm had the same requests, so a ratio resamples both
sides together and comparisons stay paired. Sums first, one division at the end. Quantiles are over all blocks together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from inference.batch.costs import LoadCosts
from inference.batch.load import BATCH, CLOSED, LoadRun, Point, Served
from inference.statistics import BASELINE, RESAMPLES, Bootstrap, Estimate, ratio

SCHEDULED, GENERATE = "scheduled", "generate"
_FIXED = "fixed-"

Array = NDArray[np.float64]


def fixed_arm(tokens: int) -> str:
    """Name of the arm that proposes so many tokens every round."""
    return f"{_FIXED}{tokens}"


@dataclass(frozen=True)
class LoadFigure:
    """One arm at one load.

    Attributes:
        arm: its name.
        point: the load.
        precision: the target's arithmetic.
        blocks: blocks of requests behind the figures.
        requests: requests in them.
        tokens_per_s: tokens emitted over seconds, both within the windows of `Trace.window`.
        over_none: that over target-only decoding's, on the same blocks.
        over_fixed: that over the best fixed length's, on the same blocks. The best is whichever came out best over all
            blocks of this load, which favours it: part of its lead is luck. None where no fixed length ran.
        best_fixed: whether this arm is that best one.
        mean_length: tokens proposed a round of a request.
        tau: tokens emitted per request and round.
        alpha: accepted over proposed tokens, counting those after an unbroken prefix; None where nothing was proposed.
        token_ms: median and 95th percentile of the time between two tokens, within the window; see `Served.gaps`. None
            where no request had two rounds.
        request_token_ms: likewise over requests, from the start of the first round to the end, over the tokens.
        first_ms: median and 95th percentile from arrival to the first tokens.
        total_ms: likewise from arrival to the end.
        round_ms: a step of the engine, arrivals waited for included.
        outside_round_ms: of it, what went neither into passes of the target nor into drafting.
        outside_request_ms: the same, shared out among the requests.
        mismatches: greedy requests that left the target-only output of their block.
        unexplained: those of them that are no near-tie.
    """

    arm: str
    point: Point
    precision: str
    blocks: int
    requests: int
    tokens_per_s: Estimate
    over_none: Estimate
    over_fixed: Estimate | None
    best_fixed: bool
    mean_length: float
    tau: float
    alpha: float | None
    token_ms: tuple[float, float] | None
    request_token_ms: tuple[float, float]
    first_ms: tuple[float, float]
    total_ms: tuple[float, float]
    round_ms: float
    outside_round_ms: float
    outside_request_ms: float
    mismatches: int
    unexplained: int

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def load_figures(runs: Iterable[LoadRun], *, seed: int = 0, resamples: int = RESAMPLES) -> list[LoadFigure]:
    """Figures of every arm at every load, loads in order and arms as they first appear.

    Args:
        runs: whole blocks; target-only decoding is among the arms of each.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    runs = list(runs)
    found = []
    for point in sorted({run.point for run in runs}):
        here = _At([run for run in runs if run.point == point], seed=seed, resamples=resamples)
        found += [here.figure(arm) for arm in here.arms]
    return found


class _At:
    """All runs of one load."""

    def __init__(self, runs: list[LoadRun], *, seed: int, resamples: int) -> None:
        self.arms = sorted({run.arm for run in runs}, key=_arm_order)
        self.blocks = sorted({run.block for run in runs})
        self._runs = {(run.arm, run.block): run for run in runs}
        self._boot = Bootstrap([str(block) for block in self.blocks], seed=seed, resamples=resamples)
        fixed = [arm for arm in self.arms if arm.startswith(_FIXED)]
        self.best_fixed = max(fixed, key=lambda arm: float(self.speed(arm)[0]), default=None)

    def of(self, arm: str) -> list[LoadRun]:
        """Runs of an arm, block by block."""
        return [self._runs[arm, block] for block in self.blocks]

    def speed(self, arm: str) -> Array:
        """Tokens a second, one entry per resample, the plain figure first."""
        traces = [run.trace for run in self.of(arm)]
        tokens = self._boot.weights @ np.array([float(trace.window_tokens) for trace in traces])
        return ratio(tokens, self._boot.weights @ np.array([trace.window for trace in traces]))

    def over(self, arm: str, other: str) -> Estimate:
        """Throughput of one arm over another's, paired."""
        return self._boot.estimate(ratio(self.speed(arm), self.speed(other)))

    def figure(self, arm: str) -> LoadFigure:
        runs = self.of(arm)
        served = [one for run in runs for one in run.trace.served]
        gaps = [gap for run in runs for one in run.trace.served for gap in one.gaps(until=run.trace.window)]
        rounds = sum(run.trace.rounds for run in runs)
        spent = sum(run.trace.outside_seconds for run in runs)
        proposed, accepted = sum(sum(one.proposed) for one in served), sum(sum(one.accepted) for one in served)
        passes = sum(one.passes for one in served)
        misses = [one.mismatch for one in served if one.mismatch is not None]
        return LoadFigure(
            arm=arm,
            point=runs[0].point,
            precision=runs[0].precision,
            blocks=len(runs),
            requests=len(served),
            tokens_per_s=self._boot.estimate(self.speed(arm)),
            over_none=self.over(arm, BASELINE),
            over_fixed=None if self.best_fixed is None else self.over(arm, self.best_fixed),
            best_fixed=arm == self.best_fixed,
            mean_length=sum(int(length) * n for one in served for length, n in one.blocks.items()) / passes,
            tau=sum(one.tokens for one in served) / passes,
            alpha=accepted / proposed if proposed else None,
            token_ms=_milliseconds(gaps) if gaps else None,
            request_token_ms=_milliseconds([one.seconds_per_token for one in served]),
            first_ms=_milliseconds([_first(one) for one in served]),
            total_ms=_milliseconds([one.end - one.arrival for one in served]),
            round_ms=1e3 * sum(run.trace.elapsed for run in runs) / rounds,
            outside_round_ms=1e3 * spent / rounds,
            outside_request_ms=1e3 * spent / len(served),
            mismatches=len(misses),
            unexplained=sum(not miss.near_tie for miss in misses),
        )


def _arm_order(arm: str) -> tuple[int, int, str]:
    """The baseline first, fixed lengths by length, then the others by name."""
    if arm == BASELINE:
        return (0, 0, arm)
    return (1, int(arm.removeprefix(_FIXED)), arm) if arm.startswith(_FIXED) else (2, 0, arm)


def _first(one: Served) -> float:
    return one.emissions[0][0] - one.arrival


def _milliseconds(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    median, high = np.quantile(np.array(seconds), [0.5, 0.95])
    return 1e3 * float(median), 1e3 * float(high)


@dataclass(frozen=True)
class Claims:
    """What a load says of the policy `scheduled` in closed loops.

    Attributes:
        loads: concurrencies at which it was measured.
        below_fixed: those at which it is surely slower than the best fixed length.
        well_above: those at which it is faster by a tenth at least.
        below_none: those at which it is surely slower than target-only decoding.
        under_generate: batch sizes at which the engine's target-only decoding is surely slower than transformers'
            `generate`.
    """

    loads: list[int]
    below_fixed: list[int]
    well_above: list[int]
    below_none: list[int]
    under_generate: list[int]


_WELL = 1.1


def claims(figures: Iterable[LoadFigure]) -> Claims:
    """Read them off the figures."""
    figures = list(figures)
    mine = [f for f in figures if f.arm == SCHEDULED and f.point.kind == CLOSED]
    own = [f for f in figures if f.arm == GENERATE and f.point.kind == BATCH]
    return Claims(
        loads=[f.point.concurrency for f in mine],
        below_fixed=[f.point.concurrency for f in mine if f.over_fixed and f.over_fixed.surely_below(1.0)],
        well_above=[f.point.concurrency for f in mine if f.over_fixed and f.over_fixed.value >= _WELL],
        below_none=[f.point.concurrency for f in mine if f.over_none.surely_below(1.0)],
        under_generate=[f.point.concurrency for f in own if f.over_none.surely_above(1.0)],
    )


def foretold(conditional: Sequence[float], costs: LoadCosts, *, concurrency: int, longest: int) -> tuple[int, float]:
    """The fixed length that the measured parts make best for so many requests, and its throughput over target-only.

    A round of R requests that each propose l gives R (1 + sum_{k<=l} a_k) tokens, for drafting l tokens each and one
    pass of R (1 + l) tokens. Prefills are left out, and requests are all alike, so this is what there is to gain from a
    length, not a forecast.

    Args:
        conditional: acceptance of each position given that all before it stood.
        costs: of rounds, in the arithmetic of the draft.
        concurrency: R.
        longest: longest length considered.

    Returns:
        Length (0 where nothing pays) and ratio, at least 1.
    """
    base = costs.pass_seconds(concurrency, concurrency)
    best, survival, tokens = (0, 1.0), 1.0, 1.0
    for length, chance in enumerate(conditional[:longest], start=1):
        survival *= chance
        tokens += survival
        seconds = costs.draft_seconds(concurrency, length) + costs.pass_seconds(concurrency, concurrency * (1 + length))
        if tokens * base / seconds > best[1]:
            best = (length, tokens * base / seconds)
    return best
