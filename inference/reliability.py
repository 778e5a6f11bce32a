"""What a draft's confidences are worth on prompts they were not calibrated on, and whether margins predict better.

Calibration error, area under the ROC curve and reliability diagrams per position, with intervals over prompts. See
`inference.calibration` for what is judged by which outcome.

    measured = report(rounds_for_fit, rounds_for_test)
    measured.calibration.apply(position=3, confidence=0.8)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from inference.calibration import (
    BINS,
    GRID,
    Calibration,
    CalibrationRound,
    Indices,
    Mask,
    Table,
    bin_index,
    fit_calibration,
    mean_ranks,
)
from inference.margin import Array, MarginEstimator
from inference.statistics import RESAMPLES, Bootstrap, Estimate, ratio

_EDGE = 1e-6
# Score levels per slice of the pair count: bounds its memory at this times the number of prompts.
_LEVELS = 2048


class Bin(NamedTuple):
    """One point of a reliability diagram."""

    predicted: float
    """Mean prediction."""
    observed: float
    """Share of outcomes that came true."""
    num_outcomes: int


@dataclass(frozen=True)
class PositionReport:
    """What a draft's confidences are worth at one position; intervals are 95 % bootstraps over prompts.

    Attributes:
        position: 1-based.
        proposed: rounds that proposed it: behind the calibration errors, which are of a_k against prefix survival.
        observations: rounds whose earlier tokens all stood: behind the AUCs, which are of survival given those.
        error_before: expected calibration error of a_k as the draft states it.
        error_after: the same after calibration of this and the earlier positions.
        auc: of c_k; a temperature does not change it.
        margin_auc: of the margin estimator, on the observations with a margin; nan where it gives no chance.
        before: reliability of a_k as the draft states it.
        after: the same after calibration.
    """

    position: int
    proposed: int
    observations: int
    error_before: Estimate
    error_after: Estimate
    auc: Estimate
    margin_auc: Estimate
    before: tuple[Bin, ...]
    after: tuple[Bin, ...]


@dataclass(frozen=True)
class BetterSource:
    """Which chance to go by, and why.

    Attributes:
        source: "margin" where its mean log loss is surely the smaller one, else "confidence".
        observations: verdicts for which both chances exist.
        confidence_loss: mean log loss of the confidences, calibrated where that helps, in nats.
        margin_loss: mean log loss of the margin estimator, in nats.
        difference: confidence_loss - margin_loss, above 0 where the margin predicts better.
    """

    source: Literal["confidence", "margin"]
    observations: int
    confidence_loss: float
    margin_loss: float
    difference: Estimate


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration, fitted on some prompts, and its figures on others.

    Attributes:
        calibration: the fit.
        positions: from the first; those that the rounds for the test proposed.
        source: confidence or margin, on the rounds for the test.
    """

    calibration: Calibration
    positions: tuple[PositionReport, ...]
    source: BetterSource

    @property
    def used(self) -> Calibration | None:
        """The calibration, where it brings the chances nearer to what happened, else None."""
        return self.calibration if _helps(self.positions) else None


def _helps(positions: Sequence[PositionReport]) -> bool:
    """Whether calibrated chances are nearer to what happened, over all positions by how often they were proposed: few
    prompts may fit what the others do not do."""
    judged = [at for at in positions if math.isfinite(at.error_before.value + at.error_after.value)]
    return sum(at.proposed * (at.error_before.value - at.error_after.value) for at in judged) > 0.0


def auc(scores: Array, labels: Array | Mask) -> float:
    """Chance that a positive outscores a negative, ties counted half (Mann-Whitney, from mean ranks).

    Args:
        scores: `[n]`.
        labels: `[n]`, 1 or true for a positive.

    Returns:
        The area under the ROC curve; nan when one class is absent.
    """
    positive = labels.astype(bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return math.nan
    ranks = mean_ranks(scores[None])[0]
    return float((ranks[positive].mean() - (num_positive - 1) / 2.0) / num_negative)


def reliability(predicted: Array, observed: Array | Mask, bins: int = BINS) -> list[Bin]:
    """Points of the reliability diagram, in the bins of `expected_calibration_error`, those without data left out."""
    index = bin_index(predicted[None], bins)[0]
    return [
        Bin(float(predicted[own].mean()), float(observed[own].mean()), int(own.sum()))
        for own in (index == b for b in range(bins))
        if own.any()
    ]


def report(
    rounds_for_fit: Sequence[CalibrationRound],
    rounds_for_test: Sequence[CalibrationRound],
    *,
    grid: Sequence[float] = GRID,
    bins: int = BINS,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> CalibrationReport:
    """Fit on some rounds, judge on others.

    The calibration errors of few observations are mostly noise, see `expected_calibration_error`; their intervals are
    reverse percentile ones, which takes the noise of the resamples out again, but not that of the sample.

    Args:
        rounds_for_fit: of the calibration and of the margin estimator.
        rounds_for_test: of everything that is reported.
        grid: temperatures to try.
        bins: of the calibration errors.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ValueError: a prompt is in both.
    """
    shared = {r.prompt for r in rounds_for_fit} & {r.prompt for r in rounds_for_test}
    if shared:
        raise ValueError(f"{len(shared)} prompts are in the fit and in the test; split the rounds by prompt")
    calibration, estimator = fit_calibration(rounds_for_fit, grid=grid, bins=bins), fit_margin(rounds_for_fit)
    table = Table(rounds_for_test)
    boot = Bootstrap([r.prompt for r in rounds_for_test], seed=seed, resamples=resamples)
    prompts = np.array([boot.index[r.prompt] for r in rounds_for_test], dtype=np.int64)
    before, after = table.confidences.cumprod(axis=1), table.calibrated(calibration).cumprod(axis=1)
    by_margin = _margin_chances(table, estimator)

    def of_position(k: int) -> PositionReport:
        own, seen, survived = table.proposed[:, k], table.observed[:, k], table.survived[:, k]
        known = seen & ~np.isnan(by_margin[:, k])
        return PositionReport(
            position=k + 1,
            proposed=int(own.sum()),
            observations=int(seen.sum()),
            error_before=_error_estimate(before[own, k], survived[own], prompts[own], boot, bins),
            error_after=_error_estimate(after[own, k], survived[own], prompts[own], boot, bins),
            auc=_auc_estimate(table.confidences[seen, k], survived[seen], prompts[seen], boot),
            margin_auc=_auc_estimate(by_margin[known, k], survived[known], prompts[known], boot),
            before=tuple(reliability(before[own, k], survived[own], bins)),
            after=tuple(reliability(after[own, k], survived[own], bins)),
        )

    positions = tuple(of_position(k) for k in range(table.proposed.shape[1]))
    used = calibration if _helps(positions) else Calibration()
    return CalibrationReport(
        calibration=calibration,
        positions=positions,
        source=better_source(used, estimator, rounds_for_test, seed=seed, resamples=resamples),
    )


def better_source(
    calibration: Calibration,
    estimator: MarginEstimator,
    rounds: Sequence[CalibrationRound],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> BetterSource:
    """Whether the draft's own confidence or the margin estimator predicts survival better.

    By mean log loss over the observed positions for which both give a chance. The margin needs an interval of the
    difference that lies wholly on its side; in doubt, and without data, the draft's own confidence stays.

    Args:
        calibration: of the confidences, fitted on other rounds.
        estimator: fitted on other rounds; it does not learn from these.
        rounds: to judge on.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    table = Table(rounds)
    boot = Bootstrap([r.prompt for r in rounds], seed=seed, resamples=resamples)
    prompts = np.array([boot.index[r.prompt] for r in rounds], dtype=np.int64)
    by_margin = _margin_chances(table, estimator)
    known = table.observed & ~np.isnan(by_margin)
    survived, count = table.survived[known], int(known.sum())
    own_loss = _log_loss(table.calibrated(calibration)[known], survived)
    margin_loss = _log_loss(by_margin[known], survived)
    cluster = np.broadcast_to(prompts[:, None], known.shape)[known]
    sums = np.bincount(cluster, own_loss - margin_loss, minlength=len(boot.index))
    counts = np.bincount(cluster, minlength=len(boot.index))
    difference = boot.estimate(ratio(boot.weights @ sums, boot.weights @ counts))
    return BetterSource(
        source="margin" if difference.surely_above(0.0) else "confidence",
        observations=count,
        confidence_loss=float(own_loss.mean()) if count else math.nan,
        margin_loss=float(margin_loss.mean()) if count else math.nan,
        difference=difference,
    )


def fit_margin(rounds: Sequence[CalibrationRound]) -> MarginEstimator:
    """A margin estimator that has seen the verdicts of these rounds, in their order."""
    estimator = MarginEstimator()
    for r in rounds:
        for position, margin in enumerate(r.margins[: r.num_accepted + 1], start=1):
            if not math.isnan(margin):
                estimator.add(position, margin, survived=position <= r.num_accepted)
    return estimator


def _margin_chances(table: Table, estimator: MarginEstimator) -> Array:
    """The estimator's chances at observed positions, `[R, G]`; nan elsewhere and where it gives none."""
    chances = np.full(table.margins.shape, math.nan)
    for row, k in np.argwhere(table.observed & ~np.isnan(table.margins)):
        chance = estimator.chance(int(k) + 1, float(table.margins[row, k]))
        chances[row, k] = math.nan if chance is None else chance
    return chances


def _log_loss(chances: Array, survived: Mask) -> Array:
    """Minus the log of the chance given to what happened, in nats, `[n]`."""
    inner = np.clip(chances, _EDGE, 1.0 - _EDGE)
    loss: Array = -np.log(np.where(survived, inner, 1.0 - inner))
    return loss


def _error_estimate(predicted: Array, observed: Mask, prompts: Indices, boot: Bootstrap, bins: int) -> Estimate:
    """Expected calibration error and its reverse percentile interval; the resamples keep the bins of the sample.

    Resampling adds the noise of every bin a second time, which an absolute value turns into a larger error: the plain
    percentile interval of a good calibration lies wholly above the truth. Reflected about the value, it does not.
    """
    num_prompts = len(boot.index)
    index = bin_index(predicted[None], bins)[0]
    gaps = _tally(index, prompts, (bins, num_prompts), predicted - observed)
    counts = np.bincount(prompts, minlength=num_prompts)
    plain = boot.estimate(ratio(np.abs(boot.weights @ gaps.T).sum(axis=1), boot.weights @ counts))
    if plain.low is None or plain.high is None:
        return plain
    low, high = max(0.0, 2.0 * plain.value - plain.high), max(plain.value, 2.0 * plain.value - plain.low)
    return Estimate(plain.value, low, high)


def _auc_estimate(scores: Array, labels: Mask, prompts: Indices, boot: Bootstrap) -> Estimate:
    """AUC and its interval: pairs won are counted per pair of prompts once, then weighted by each resample."""
    num_prompts = len(boot.index)
    wins = _wins(scores, labels, prompts, num_prompts)
    positives = boot.weights @ np.bincount(prompts[labels], minlength=num_prompts)
    negatives = boot.weights @ np.bincount(prompts[~labels], minlength=num_prompts)
    return boot.estimate(ratio(((boot.weights @ wins) * boot.weights).sum(axis=1), positives * negatives))


def _wins(scores: Array, labels: Mask, prompts: Indices, num_prompts: int) -> Array:
    """`wins[p, q]`: pairs of a positive of prompt p above a negative of prompt q, ties half."""
    levels = np.unique(scores, return_inverse=True)[1]
    wins, below = np.zeros((num_prompts, num_prompts)), np.zeros(num_prompts)
    for start in range(0, int(levels.max(initial=-1)) + 1, _LEVELS):
        chosen = (levels >= start) & (levels < start + _LEVELS)
        shape = (_LEVELS, num_prompts)
        won, lost = (
            _tally(levels[own] - start, prompts[own], shape, np.ones(int(own.sum())))
            for own in (chosen & labels, chosen & ~labels)
        )
        wins += won.T @ (below + lost.cumsum(axis=0) - lost / 2.0)
        below += lost.sum(axis=0)
    return wins


def _tally(rows: Indices, columns: Indices, shape: tuple[int, int], values: Array) -> Array:
    """Sums of values by (row, column)."""
    sums = np.bincount(rows * shape[1] + columns, values, minlength=shape[0] * shape[1])
    return sums.reshape(shape).astype(np.float64, copy=False)
