"""Seconds against a size: every size in every round, in shuffled order, and the exponent with which they grow."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from inference.statistics import Array
from pipelines.bench.outcome import Curve, Figure, Goal
from pipelines.bench.paired import exponent, exponent_beyond_first
from pipelines.progress import tracked

SURPRISE = Goal(1.15, at_least=False)
"""Largest exponent that is no surprise where twice as much should take twice as long."""


@dataclass(frozen=True)
class Growth:
    """What was measured of one thing that grows.

    Attributes:
        name: of it.
        sizes: ascending.
        seconds: `[rounds, sizes]`.
    """

    name: str
    sizes: list[int]
    seconds: Array

    def means(self) -> list[float]:
        """Seconds by size."""
        means: list[float] = self.seconds.mean(axis=0).tolist()
        return means

    def curve(self, scale: float = 1.0) -> Curve:
        """For a picture, whose axis says by what it grows."""
        return Curve(self.name.partition(", by ")[0], self.sizes, [scale * seconds for seconds in self.means()])

    def figure(self, *, goal: Goal | None, seed: int) -> Figure:
        """The exponent over all sizes, and in the detail the one of the last step, which no constant part hides."""
        detail = {"seconds": dict(zip(map(str, self.sizes), self.means(), strict=True))}
        if len(self.sizes) > 1:
            last = exponent(self.sizes[-2:], self.seconds[:, -2:], seed=seed)
            detail["exponent of the last step"] = {"value": last.value}
        value = exponent(self.sizes, self.seconds, seed=seed)
        return Figure(f"{self.name}: exponent", value, "", goal, detail)

    def figure_beyond_first(self, *, seed: int) -> Figure:
        """The exponent of what a size costs beyond the smallest one."""
        means, sizes = self.means(), self.sizes
        detail = {"microseconds for each": 1e6 * (means[-1] - means[0]) / (sizes[-1] - sizes[0])}
        name = f"{self.name}: exponent of what is added to {sizes[0]}"
        return Figure(name, exponent_beyond_first(sizes, self.seconds, seed=seed), "", None, detail)

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {"name": self.name, "sizes": self.sizes, "seconds": self.seconds.tolist()}


def grown(name: str, work: Mapping[int, Callable[[], float]], *, rounds: int, seed: int) -> Growth:
    """Measure all sizes in every round, after once that is not counted.

    Args:
        name: of what grows.
        work: by size; each does it once and returns the seconds that count.
        rounds: how often; the interval is over them.
        seed: of the orders.
    """
    sizes = sorted(work)
    for size in sizes:
        work[size]()
    draw = random.Random(seed)
    seconds = np.zeros((rounds, len(sizes)))
    for number in tracked(range(rounds), name, unit="rounds"):
        order = list(range(len(sizes)))
        draw.shuffle(order)
        for place in order:
            seconds[number, place] = work[sizes[place]]()
    return Growth(name, sizes, seconds)
