"""What a row of the benchmark says: figures with intervals and goals, the samples behind them, pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.statistics import Estimate


@dataclass(frozen=True)
class Goal:
    """A bound that a figure is held against.

    Attributes:
        bound: in the figure's unit.
        at_least: whether the figure has to reach the bound; otherwise it must not exceed it.
    """

    bound: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        """Whether a value is on the right side; nothing that is not a number is."""
        return value >= self.bound if self.at_least else value <= self.bound

    def surely_met(self, estimate: Estimate) -> bool:
        """Whether the whole interval is; never without one."""
        end = estimate.low if self.at_least else estimate.high
        return end is not None and self.met(end)

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One number of a row.

    Attributes:
        name: what it is, with what it is measured against.
        estimate: value and interval.
        unit: `x` for a ratio.
        goal: None where the figure is only shown.
        detail: what it was computed from, as plain data; shown in the written report.
    """

    name: str
    estimate: Estimate
    unit: str = "x"
    goal: Goal | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        return None if self.goal is None else self.goal.met(self.estimate.value)

    @property
    def verdict(self) -> str:
        """`met`, `not met`, or met by the value and not by its whole interval; empty without a goal."""
        if self.goal is None:
            return ""
        if not self.met:
            return "not met"
        ends = (self.estimate.low, self.estimate.high)
        return "met" if None in ends or self.goal.surely_met(self.estimate) else "met, not by the whole interval"

    def line(self) -> str:
        """For a terminal."""
        shown = f"{self.name}: {self.estimate} {self.unit}".rstrip()
        return shown if self.goal is None else f"{shown}, goal {self.goal}: {self.verdict}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, the verdict included."""
        return {
            "name": self.name,
            "value": self.estimate.value,
            "low": self.estimate.low,
            "high": self.estimate.high,
            "unit": self.unit,
            "goal": None if self.goal is None else {"bound": self.goal.bound, "at_least": self.goal.at_least},
            "met": self.met,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class Curve:
    """A line of a picture.

    Attributes:
        name: in the legend.
        sizes: along x.
        values: along y.
    """

    name: str
    sizes: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Picture:
    """A log-log plot.

    Attributes:
        key: name of its file without the ending.
        title: above it.
        x_label: with the unit.
        y_label: with the unit.
        curves: what is drawn.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Outcome:
    """What a row gives back.

    Attributes:
        figures: in the order they are shown.
        samples: what they were computed from, as plain data.
        notes: sentences for the reader: what was chosen, what did not run.
        pictures: to be drawn.
    """

    figures: Sequence[Figure]
    samples: Sequence[Any] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
