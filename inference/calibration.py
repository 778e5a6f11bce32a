"""Calibration of a draft's confidences, position by position: sequential temperature scaling.

Pure functions on arrays: no model, no drafter. Notation, per round: c_k = chance that token k survives given that the
earlier ones did, computed before x_k was drawn; a_k = c_1 * ... * c_k, the chance that the prefix up to k survives.
Two outcomes must not be confused:

- prefix survival of k, `num_accepted >= k`: known for every proposed k; a_k is judged by it;
- survival of k given the earlier ones: known only for k <= num_accepted + 1, as nobody judged what stood behind the
  first rejection; c_k is judged by it, on those rounds only.

    fit_calibration(rounds).apply(position=3, confidence=0.8)

What a calibration is worth on other prompts says `inference.reliability`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.errors import InputError
from inference.margin import Array, sigmoid

GRID = tuple(float(t) for t in np.geomspace(0.2, 5.0, 61))
"""Temperatures tried: steps of 5.5 %, 1 in the middle."""
BINS = 10
LEAST = 50
_EDGE = 1e-6

Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class CalibrationRound:
    """One proposal of a draft and its verdict.

    Attributes:
        prompt: identity of the prompt; rounds of one prompt are one cluster of the bootstrap.
        confidences: c_1..c_n of the n proposed tokens, in [0, 1].
        margins: top-2 logit margins of the draft's rows, n of them; nan where a drafter has no rows.
        num_accepted: leading tokens that stood, 0 to n.
    """

    prompt: str
    confidences: tuple[float, ...]
    margins: tuple[float, ...]
    num_accepted: int

    def __post_init__(self) -> None:
        if len(self.margins) != len(self.confidences) or not 0 <= self.num_accepted <= len(self.confidences):
            raise ValueError(
                f"{len(self.confidences)} confidences, {len(self.margins)} margins, {self.num_accepted} accepted: "
                f"give one margin per confidence (nan where there is none), and accept no more tokens than those"
            )


@dataclass(frozen=True)
class Calibration:
    """Temperatures of the confidences: c_k becomes sigmoid(logit(c_k) / T_k).

    Attributes:
        temperatures: T_1.. by position; positions beyond the last use the last.
    """

    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.temperatures or not all(math.isfinite(t) and t > 0.0 for t in self.temperatures):
            raise ValueError(f"temperatures are {list(self.temperatures)}; use at least one, all finite and positive")

    def apply(self, position: int, confidence: float) -> float:
        """Calibrated chance.

        Args:
            position: 1-based position in the block.
            confidence: c_k as the draft states it; clipped to [1e-6, 1 - 1e-6].
        """
        inner = min(max(confidence, _EDGE), 1.0 - _EDGE)
        logit = math.log(inner) - math.log1p(-inner)
        return 0.5 * (1.0 + math.tanh(0.5 * logit / self.temperature(position)))

    def temperature(self, position: int) -> float:
        """T_k of a 1-based position."""
        return self.temperatures[min(position, len(self.temperatures)) - 1]

    def to_json(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {"temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, data: object, *, where: str = "") -> "Calibration":
        """Read what `to_json` gave.

        Args:
            data: decoded JSON, from outside.
            where: the file it comes from.

        Raises:
            InputError: it is something else.
        """
        listed = data.get("temperatures") if isinstance(data, dict) else None
        mend = "fit the calibration again, or remove it to use the confidences as they are"
        if not isinstance(listed, list) or any(isinstance(t, bool) or not isinstance(t, (int, float)) for t in listed):
            raise InputError('not a calibration: no list of numbers under "temperatures"', where=where, mend=mend)
        try:
            return cls(tuple(float(t) for t in listed))
        except (ValueError, OverflowError) as error:
            raise InputError(f"not a calibration: {error}", where=where, mend=mend) from error


class Table:
    """Rounds as arrays: R rounds, G positions; column k - 1 is position k."""

    def __init__(self, rounds: Sequence[CalibrationRound]) -> None:
        lengths = np.array([len(r.confidences) for r in rounds], dtype=np.int64)
        positions = np.arange(1, lengths.max(initial=0) + 1)
        self.accepted = np.array([r.num_accepted for r in rounds], dtype=np.int64)
        self.proposed: Mask = positions <= lengths[:, None]
        self.survived: Mask = positions <= self.accepted[:, None]
        self.observed: Mask = self.proposed & (positions <= self.accepted[:, None] + 1)
        self.confidences = self._padded([r.confidences for r in rounds])
        self.margins = self._padded([r.margins for r in rounds])

    def _padded(self, rows: list[tuple[float, ...]]) -> Array:
        """`[R, G]`, 1 where nothing was proposed."""
        values = np.ones(self.proposed.shape)
        values[self.proposed] = [value for row in rows for value in row]
        return values

    def calibrated(self, calibration: Calibration) -> Array:
        """c_k after calibration, `[R, G]`."""
        temperatures = [calibration.temperature(k + 1) for k in range(self.proposed.shape[1])]
        return scaled(self.confidences, np.array(temperatures))


def fit_calibration(
    rounds: Sequence[CalibrationRound], *, grid: Sequence[float] = GRID, bins: int = BINS, least: int = LEAST
) -> Calibration:
    """Sequential temperature scaling (DSpark).

    Left to right, T_k is the temperature of the grid that minimises the expected calibration error of a_k against
    prefix survival, the earlier temperatures fixed. Of equally good ones the nearest to 1 is taken.

    Args:
        rounds: to fit on; judge the fit on others.
        grid: temperatures to try.
        bins: of the calibration error.
        least: a position whose outcome was observed in fewer rounds keeps the temperature of the one before, and the
            first one 1. Rounds that ended earlier do not count: they say nothing of c_k.

    Returns:
        A temperature per position that was ever proposed.
    """
    table = Table(rounds)
    tried = np.array(sorted(grid, key=lambda t: abs(math.log(t))))
    before = np.ones(len(rounds))
    temperatures: list[float] = []
    for k in range(table.proposed.shape[1]):
        own, temperature = table.proposed[:, k], temperatures[-1] if temperatures else 1.0
        if table.observed[:, k].sum() >= least:
            products = before[own] * scaled(table.confidences[own, k], tried[:, None])
            errors = _calibration_errors(products, table.survived[own, k], bins)
            temperature = float(tried[errors.argmin()])
        before = before * scaled(table.confidences[:, k], np.array(temperature))
        temperatures.append(temperature)
    return Calibration(tuple(temperatures)) if temperatures else Calibration()


def expected_calibration_error(predicted: Array, observed: Array | Mask, bins: int = BINS) -> float:
    """Expected calibration error with equal-mass bins: sum over bins b of n_b / n * |mean predicted - mean observed|.

    The n predictions in increasing order are cut into bins of equal size; equal predictions share a bin, the one their
    mean rank falls into, so the order of the data does not matter. Noise alone makes it positive: a perfect predictor
    with chances near p expects about 0.8 * sqrt(bins * p * (1 - p) / n).

    Args:
        predicted: `[n]`, chances.
        observed: `[n]`, 1 or true where it came true.
        bins: number of bins.

    Returns:
        The error in [0, 1]; nan without data.
    """
    return float(_calibration_errors(predicted[None], observed, bins)[0])


def scaled(confidences: Array, temperatures: Array) -> Array:
    """sigmoid(logit(c) / T), c kept off 0 and 1; shapes broadcast."""
    inner = np.clip(confidences, _EDGE, 1.0 - _EDGE)
    return sigmoid((np.log(inner) - np.log1p(-inner)) / temperatures)


def mean_ranks(values: Array) -> Array:
    """Ranks from 0 along each row, the mean rank for ties; `[rows, n]`."""
    order = values.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    starts = np.ones(values.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = np.ones(values.shape, dtype=bool)
    ends[:, :-1] = starts[:, 1:]
    places = np.arange(values.shape[1])
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, places, values.shape[1])[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2.0, axis=1)
    return ranks


def bin_index(predicted: Array, bins: int) -> Indices:
    """Equal-mass bin of every prediction within its row, `[rows, n]`; ties share one."""
    index: Indices = ((mean_ranks(predicted) + 0.5) * bins / predicted.shape[1]).astype(np.int64)
    return index


def _calibration_errors(predicted: Array, observed: Array | Mask, bins: int) -> Array:
    """`expected_calibration_error` of every row of `predicted` `[rows, n]` against `observed` `[n]`."""
    rows, count = predicted.shape
    if not count:
        return np.full(rows, math.nan)
    place = bin_index(predicted, bins) + bins * np.arange(rows)[:, None]
    gaps = np.bincount(place.ravel(), (predicted - observed).ravel(), minlength=rows * bins)
    errors: Array = np.abs(gaps).reshape(rows, bins).sum(axis=1) / count
    return errors
