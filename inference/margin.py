"""Chance of acceptance from the draft's top-2 logit margin: a logistic curve per position, learnt while decoding.

No head to train: the labels are the verdicts. It knows nothing of drafters or of policies. A caller may ask for the
chance of position k before x_k is drawn, as the margin is of the row that x_k is drawn from.

Source: vLLM's `acceptance_estimator.py` (two parameters per position, a Newton step every 100 observations, at least 50
of them, ridge 1e-3); here from a histogram of the margins, so that memory and refits do not grow with the window.

    estimator = MarginEstimator()
    estimator.add(1, margin=3.2, survived=True)
    estimator.chance(1, margin=2.5)  # None until 50 observations
"""

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

WINDOW = 2000
REFIT_EVERY = 100
LEAST = 50
HIGHEST = 30.0
"""Margins are clipped to [0, 30], in units of logits."""
_BINS = 300
_CENTRES = (np.arange(_BINS) + 0.5) * (HIGHEST / _BINS)
_RIDGE = 1e-3
_STEPS = 8
_SETTLED = 1e-6

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow at either end; any shape."""
    chances: Array = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return chances


class MarginEstimator:
    """Per position k, chance = sigmoid(b_k + w_k * margin), fitted to the latest observations.

    An observation is a verdict on a position whose predecessors all stood; positions behind the first rejection have no
    verdict and must not be added. Deterministic: the same observations in the same order give the same curves.

    Args:
        window: latest observations that count, per position; they leave `refit_every` at a time, so this is a multiple
            of it.
        refit_every: observations between two refits of a position. The first is made as soon as it has `least`.
        least: observations before a position is trusted.

    Raises:
        ValueError: the window is no multiple of `refit_every`, or never holds `least` observations.
    """

    def __init__(self, *, window: int = WINDOW, refit_every: int = REFIT_EVERY, least: int = LEAST) -> None:
        if min(window, refit_every, least) < 1 or window % refit_every or least > window:
            raise ValueError(
                f"window {window}, refit_every {refit_every}, least {least}: use a window that is a multiple of "
                f"refit_every and no smaller than least, all of them positive"
            )
        self.window, self.refit_every, self.least = window, refit_every, least
        self._curves: dict[int, _Curve] = {}

    def add(self, position: int, margin: float, survived: bool) -> None:
        """Learn from one verdict.

        Args:
            position: 1-based position in the block.
            margin: top-2 logit margin of the draft's row at it; not nan.
            survived: whether the token was accepted.
        """
        if position not in self._curves:
            self._curves[position] = _Curve(self.window, self.refit_every, self.least)
        self._curves[position].add(margin, survived)

    def chance(self, position: int, margin: float) -> float | None:
        """Chance that the token at a position survives, given that the earlier ones did.

        Args:
            position: 1-based position in the block.
            margin: top-2 logit margin of the draft's row at it; not nan.

        Returns:
            The chance, or None while nothing can be trusted: the caller then verifies everything.
        """
        parameters = self.parameters(position)
        if parameters is None:
            return None
        intercept, slope = parameters
        return 0.5 * (1.0 + math.tanh(0.5 * (intercept + slope * min(max(margin, 0.0), HIGHEST))))

    def parameters(self, position: int) -> tuple[float, float] | None:
        """(b, w) in use at a position: its own; the last fitted position's where it has no observation at all.

        None for a position with some observations, but fewer than `least`: full verification brings the rest.
        """
        if position in self._curves:
            return self._curves[position].fitted
        fitted = [k for k, curve in self._curves.items() if k < position and curve.fitted is not None]
        return self._curves[max(fitted)].fitted if fitted else None


class _Curve:
    """The window of one position, as counts `[2, bins]` (row 0 rejected, row 1 accepted), and its fit."""

    def __init__(self, window: int, refit_every: int, least: int) -> None:
        self.refit_every, self.least = refit_every, least
        self.counts: Counts = np.zeros((2, _BINS), dtype=np.int64)
        self.open: Counts = np.zeros_like(self.counts)
        # Full chunks, the oldest first; the open one completes the window.
        self.chunks: deque[Counts] = deque()
        self.most_chunks = window // refit_every - 1
        self.num_open = 0
        self.num_since_fit = 0
        self.fitted: tuple[float, float] | None = None

    def add(self, margin: float, survived: bool) -> None:
        """Count one observation; refit where one is due."""
        if self.num_open == self.refit_every:
            self._close_chunk()
        column = min(int(max(margin, 0.0) / HIGHEST * _BINS), _BINS - 1)
        self.open[int(survived), column] += 1
        self.counts[int(survived), column] += 1
        self.num_open += 1
        self.num_since_fit += 1
        trusted = len(self.chunks) * self.refit_every + self.num_open >= self.least
        if trusted and (self.fitted is None or self.num_since_fit >= self.refit_every):
            self.fitted = _fit(self.counts, self.fitted or (0.0, 0.0))
            self.num_since_fit = 0

    def _close_chunk(self) -> None:
        self.chunks.append(self.open)
        if len(self.chunks) > self.most_chunks:
            self.counts -= self.chunks.popleft()
        self.open, self.num_open = np.zeros_like(self.counts), 0


def _fit(counts: Counts, start: tuple[float, float]) -> tuple[float, float]:
    """A few Newton steps up the ridge-penalised log likelihood of a histogram.

    The Newton direction always climbs, as the penalised likelihood is strictly concave, but a full step from a
    saturated curve can overshoot; it is then halved until the likelihood grows.

    Args:
        counts: `[2, bins]`, rejected and accepted.
        start: (b, w) to step from.
    """
    parameters = np.array(start)
    total = counts.sum(axis=0)
    design = np.stack([np.ones(_BINS), _CENTRES])
    for _ in range(_STEPS):
        chances = sigmoid(parameters @ design)
        gradient = design @ (counts[1] - total * chances) - _RIDGE * parameters
        curvature = (design * (total * chances * (1.0 - chances))) @ design.T + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        before = _log_likelihood(parameters, counts)
        while np.abs(step).max() > _SETTLED and _log_likelihood(parameters + step, counts) < before:
            step /= 2.0
        parameters += step
        if np.abs(step).max() <= _SETTLED:
            break
    return float(parameters[0]), float(parameters[1])


def _log_likelihood(parameters: Array, counts: Counts) -> float:
    """Of (b, w), ridge included, in nats."""
    logits = parameters[0] + parameters[1] * _CENTRES
    fit = -(counts[1] @ np.logaddexp(0.0, -logits)) - counts[0] @ np.logaddexp(0.0, logits)
    return float(fit - 0.5 * _RIDGE * (parameters @ parameters))
