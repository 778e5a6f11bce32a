"""A figure of a report as data, and the table below it; what is in which figure is said in `charts`.

Draws nothing (that is `drawing`) and computes no figure.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from inference.statistics import Estimate, Scorecard, find_card
from pipelines.version_report.contents import Contents

LINES, POINTS, BARS, STACKED, FOREST = "lines", "points", "bars", "stacked", "forest"
MIB = 2**20
DIAGONAL = ((0.0, 0.0), (1.0, 1.0))


@dataclass(frozen=True)
class Series:
    """Values of one kind.

    Attributes:
        name: in the legend.
        x: numbers, or indices of the chart's categories.
        y: values, as estimates; without ends where there is no interval.
        look: number of its colour and marker, the same for one draft in all figures; None for its place in the chart.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[Estimate, ...]
    look: int | None = None


@dataclass(frozen=True)
class Chart:
    """One figure.

    Attributes:
        key: name of its file, and of its place in the page.
        title: of the figure.
        sentence: what it shows, for those who cannot see it.
        kind: `lines`, `points` (one a series), `bars` and `stacked` (horizontal, over categories), or `forest` (dots
            with intervals over categories).
        x_label: of the value axis for horizontal kinds.
        y_label: likewise of the other axis.
        series: what is drawn.
        categories: of horizontal kinds, from the top.
        reference: a line at this value, where there is something to compare with.
        path: a dashed line through these points: a frontier or the diagonal.
        whole_x: whether x is counted in whole numbers.
        unit_square: whether both axes go from 0 to 1.
        digits: decimals in the table.
    """

    key: str
    title: str
    sentence: str
    kind: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    categories: tuple[str, ...] = ()
    reference: float | None = None
    path: tuple[tuple[float, float], ...] = ()
    whole_x: bool = False
    unit_square: bool = False
    digits: int = 2

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: every value drawn, with its interval."""
        first = self.y_label if self.categories else self.x_label
        at = sorted({x for one in self.series for x in one.x})
        values = [dict(zip(one.x, one.y, strict=True)) for one in self.series]
        rows = [
            [self._place(x), *(shown(of[x], self.digits) if x in of else "-" for of in values)]
            for x in (at if self.kind != POINTS else [])
        ]
        if self.kind == POINTS:
            header = ["", self.x_label, self.y_label]
            return header, [[s.name, f"{s.x[0]:.4g}", shown(s.y[0], self.digits)] for s in self.series]
        return [first, *(one.name for one in self.series)], rows

    def _place(self, x: float) -> str:
        return self.categories[int(x)] if self.categories else f"{x:.4g}"


def shown(estimate: Estimate, digits: int = 2) -> str:
    """A figure with its interval, where it has one."""
    if math.isnan(estimate.value):
        return "-"
    interval = "" if estimate.low is None or estimate.high is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.value:.{digits}f}{interval}"


def exact(value: float) -> Estimate:
    """A value without an interval."""
    return Estimate(value, None, None)


def named(name: str, points: Iterable[tuple[float, Estimate]], *, look: int | None = None) -> Series:
    """A series of points."""
    chosen = list(points)
    return Series(name, tuple(x for x, _ in chosen), tuple(y for _, y in chosen), look)


def pooled(contents: Contents) -> list[Scorecard]:
    """Cards over all domains and temperatures, in the order of the decision, fastest first."""
    return [find_card(contents.cards, c.arm) for c in contents.decision.candidates]


def looks(contents: Contents) -> dict[str, int]:
    """By draft, its colour and marker: its place in the decision, fastest first."""
    return {candidate.arm: place for place, candidate in enumerate(contents.decision.candidates)}
