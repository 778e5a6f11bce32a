"""Tests by betting: whether the mean of bounded numbers is above or below a bound, looked at as often as one likes.

A gambler starts with 1 and bets on every number that the null is wrong; while the null holds no strategy that fixes its
bets beforehand gains on average, so the chance that the wealth ever reaches 1 / alpha is at most alpha (Ville). Numbers
may depend on earlier ones, as long as their mean given those respects the null (Waudby-Smith and Ramdas 2024,
"Estimating means of bounded random variables by betting", section 4).

The wealth here is the mean of that of gamblers who each always stake the same share: a mixture is itself a strategy,
needs no tuning, and grows within log(number of gamblers) of the best of them.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Of the stake at which one number could ruin the gambler. Small ones find small differences in noise, large ones are
# quick where the difference is plain.
_STAKES: Array = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9])
_GRID = 201


class BettingTest:
    """A sequential test of the null "the mean is at most (greater) or at least (less) a bound".

    Args:
        null_mean: the bound, strictly between low and high.
        low: least possible number.
        high: largest possible number.
        alternative: `greater` bets on a mean above the bound, `less` on one below it.

    Raises:
        ValueError: bounds out of order, or another alternative.
    """

    def __init__(self, *, null_mean: float, low: float, high: float, alternative: str) -> None:
        if not low < null_mean < high:
            raise ValueError(f"null_mean is {null_mean}; use a number between {low} and {high}, neither of them")
        if alternative not in ("greater", "less"):
            raise ValueError(f"alternative is {alternative!r}; choose greater or less")
        self.null_mean, self.low, self.high, self.alternative = null_mean, low, high, alternative
        self.count = 0
        self._logs: Array = np.zeros(_STAKES.shape[0])
        self._best = 0.0

    @property
    def log_wealth(self) -> float:
        """Natural log of the present wealth."""
        return float(_log_mean(self._logs))

    @property
    def p_value(self) -> float:
        """Anytime-valid: 1 over the largest wealth so far, at most 1."""
        return math.exp(-max(self._best, 0.0))

    def update(self, x: float) -> None:
        """Take in one number.

        Raises:
            ValueError: it is out of bounds or no number.
        """
        if not self.low <= x <= self.high:
            raise ValueError(f"{x} is not between {self.low} and {self.high}")
        self._logs = self._logs + np.log1p(
            _stakes(self.null_mean, self.low, self.high, self.alternative) * (x - self.null_mean)
        )
        self.count += 1
        self._best = max(self._best, self.log_wealth)

    def rejected(self, alpha: float) -> bool:
        """Whether the null has been refuted at a level, at any look so far."""
        return self._best >= -math.log(alpha)


def wealth_paths(x: Array, *, null_mean: float, low: float, high: float, alternative: str) -> Array:
    """Log wealth after every number, for many runs at once: `[runs, n]` as `x`; the same figures as `BettingTest`."""
    stakes = _stakes(null_mean, low, high, alternative)
    logs = np.log1p(stakes[:, None, None] * (x - null_mean)).cumsum(2)
    paths: Array = _log_mean(logs)
    return paths


def confidence_sequence(xs: Array, *, low: float, high: float, alpha: float) -> tuple[float, float]:
    """Interval for the mean that holds at every time at once with chance 1 - alpha: means that neither bet refutes.

    Args:
        xs: numbers so far, `[n]`.
        low: least possible number.
        high: largest possible number.
        alpha: chance of ever being wrong, both sides together.
    """
    if not len(xs):
        return low, high
    means = np.linspace(low, high, _GRID)[1:-1]
    bound = -math.log(alpha / 2)
    values = np.asarray(xs, dtype=np.float64)[None]
    kept = []
    for mean in means:
        worst = max(
            float(wealth_paths(values, null_mean=float(mean), low=low, high=high, alternative=side).max())
            for side in ("greater", "less")
        )
        if worst < bound:
            kept.append(float(mean))
    step = (high - low) / (_GRID - 1)
    if not kept:
        centre = float(values.mean())
        return max(low, centre - step), min(high, centre + step)
    return max(low, kept[0] - step), min(high, kept[-1] + step)


def _stakes(null_mean: float, low: float, high: float, alternative: str) -> Array:
    """Stakes per unit of x - null_mean, signed, none of which a number within bounds can turn into ruin."""
    stakes: Array = _STAKES / (null_mean - low) if alternative == "greater" else -_STAKES / (high - null_mean)
    return stakes


def _log_mean(logs: Array) -> Any:
    """Log of the mean over the first axis of exp(logs), without overflow."""
    top = logs.max(0)
    return top + np.log(np.exp(logs - top).mean(0))
