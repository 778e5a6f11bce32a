"""From the evaluations of a training to a curve and what lies ahead of it: tau = a - b * n^-c, by least squares.

`n` are optimizer steps or supervised tokens. The interval of a value holds all values that some curve of this form
takes while it fits about as well as the best one (profile likelihood, noise taken as normal and independent), so it
widens by itself where the evaluations do not tell. What it cannot know: that a longer training has another schedule,
whose rate falls later, and that more steps on the same corpus say nothing new some day. Reads no file, draws nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from inference.statistics import Estimate

FEWEST = 5
"""Evaluations that a fit needs: three numbers are fitted, and what is left must tell the noise."""
AHEAD = (2.0, 4.0, 10.0)
"""How many times the last evaluation's steps are foretold."""
_LEVEL = 0.95
_POWERS = np.geomspace(0.02, 3.0, 120)
_HALVINGS = 60
_TINY = 1e-12

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One evaluation.

    Attributes:
        step: optimizer steps made.
        supervised: positions learned from so far; None where the history does not tell.
        tau: expected tokens per target pass, teacher-forced.
    """

    step: float
    supervised: float | None
    tau: float


def measured(history: Iterable[Mapping[str, Any]], *, block: int | None = None) -> list[Measured]:
    """The evaluations of a training, oldest first; those without a finite value are left out.

    Args:
        history: lines of `history.json`.
        block: tokens proposed a round, for drafts whose evaluation tells the acceptance of one token alone: tau is then
            that of a chain on which it holds everywhere, `1 + alpha + ... + alpha^block`. None leaves these out.
    """
    found: dict[float, Measured] = {}
    for line in history:
        tau, alpha = line.get("eval/tau"), line.get("eval/acceptance")
        if tau is None and block is not None and _finite(alpha):
            tau = math.fsum(alpha**k for k in range(block + 1))
        if _finite(tau):
            supervised = line.get("supervised")
            found[line["step"]] = Measured(line["step"], float(supervised) if supervised else None, float(tau))
    return [found[step] for step in sorted(found)]


def proposed(history: Iterable[Mapping[str, Any]]) -> int:
    """Tokens of a block, by the positions that evaluations tell of; 0 where they tell of none."""
    names = {name for line in history for name in line if name.startswith("eval/acceptance_")}
    return max((int(name.rpartition("_")[2]) for name in names if name.rpartition("_")[2].isdecimal()), default=0)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Fit:
    """A curve through evaluations.

    Attributes:
        ceiling: `a`, where it goes to.
        span: `b`, never negative.
        power: `c`.
        noise: standard deviation of the evaluations about it.
        at: where they were taken.
        values: what they said.
        most: that no draft can exceed, as one token more than a block has; infinite where that is not known.
    """

    ceiling: float
    span: float
    power: float
    noise: float
    at: tuple[float, ...]
    values: tuple[float, ...]
    most: float = math.inf

    def value(self, n: float) -> float:
        """Of the curve after `n` steps or tokens; `math.inf` gives its ceiling."""
        return self.ceiling - (0.0 if math.isinf(n) else self.span * n**-self.power)

    def estimate(self, n: float) -> Estimate:
        """Of the curve after `n`, with its 95 % interval; an end that the evaluations leave open is None, but for the
        upper one where there is a most that no draft can exceed."""
        from scipy import stats

        free = len(self.at) - 3
        allowed = self._residual() * (1.0 + float(stats.t.ppf((1.0 + _LEVEL) / 2.0, free)) ** 2 / free) + _TINY
        best = self.value(n)
        low = self._end(n, best, -1.0, allowed)
        high = self._end(n, best, 1.0, allowed)
        if math.isfinite(self.most):
            high = self.most if high is None else min(high, self.most)
        return Estimate(min(best, self.most), low, high)

    def _residual(self) -> float:
        return math.fsum((y - self.value(x)) ** 2 for x, y in zip(self.at, self.values, strict=True))

    def _end(self, n: float, best: float, sign: float, allowed: float) -> float | None:
        """The farthest value on one side that a curve may take at `n` and still fit; None where there is no end."""
        spread = max(max(self.values) - min(self.values), self.noise, _TINY)
        inside, step = 0.0, 0.01 * spread
        while self._least(n, best + sign * (inside + step)) <= allowed:
            inside, step = inside + step, 2.0 * step
            if inside > 100.0 * spread:
                return None
        outside = inside + step
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2.0
            fits = self._least(n, best + sign * middle) <= allowed
            inside, outside = (middle, outside) if fits else (inside, middle)
        return best + sign * inside

    def _least(self, n: float, value: float) -> float:
        """Least sum of squares of the curves that take a value at `n`."""
        scale = self.at[-1]
        seen = np.power(np.asarray(self.at) / scale, -_POWERS[:, None])  # [C, N]
        there = np.zeros(len(_POWERS)) if math.isinf(n) else np.power(n / scale, -_POWERS)
        distance = there[:, None] - seen
        wanted = np.asarray(self.values) - value
        slope = (distance @ wanted) / np.maximum((distance**2).sum(1), _TINY)
        rest = wanted - np.maximum(slope, 0.0)[:, None] * distance
        return float((rest**2).sum(1).min())


def fit_curve(at: Sequence[float], values: Sequence[float], *, most: float = math.inf) -> Fit | None:
    """The curve of least squares; None where there are fewer than `FEWEST` evaluations.

    Args:
        at: steps or tokens, rising, above 0.
        values: tau there.
        most: that tau cannot exceed.
    """
    if len(at) < FEWEST:
        return None
    scale, wanted = at[-1], np.asarray(values, dtype=np.float64)
    falls = np.power(np.asarray(at, dtype=np.float64) / scale, -_POWERS[:, None])
    about = falls - falls.mean(1, keepdims=True)
    spans = np.maximum(-(about @ wanted) / np.maximum((about**2).sum(1), _TINY), 0.0)
    ceilings = wanted.mean() + spans * falls.mean(1)
    squares: Array = ((wanted - (ceilings[:, None] - spans[:, None] * falls)) ** 2).sum(1)
    best = int(squares.argmin())
    noise = math.sqrt(float(squares[best]) / (len(at) - 3))
    power = float(_POWERS[best])
    span = float(spans[best]) * scale**power
    return Fit(float(ceilings[best]), span, power, noise, tuple(at), tuple(values), most)


def foretold(at: Sequence[float], values: Sequence[float], *, most: float = math.inf) -> tuple[Estimate, float] | None:
    """What the first part of the evaluations foretells of the last one, and what that was; None with too few.

    The first part ends at half of the steps: as far ahead as twice the last evaluation is from it.
    """
    early = [index for index, n in enumerate(at) if n <= at[-1] / 2.0]
    fit = fit_curve([at[i] for i in early], [values[i] for i in early], most=most)
    return None if fit is None else (fit.estimate(at[-1]), values[-1])


__all__ = ["AHEAD", "FEWEST", "Fit", "Measured", "fit_curve", "foretold", "measured", "proposed"]
