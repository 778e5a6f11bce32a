"""Engines beside our own decoder: the same prompts, the same number of proposed tokens, the same definition."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.engines.job import Outcome
from pipelines.report import markdown_table

TOLERANCE = 0.05
"""Largest deviation of an engine's mean acceptance length from ours."""


@dataclass(frozen=True)
class Row:
    """One format in one engine.

    Attributes:
        layout: of the draft.
        engine: its name, with its version where it ran.
        outcome: with the draft; None where it did not run.
        alone: target-only decoding in the same engine.
        ours: with the draft, in our decoder.
        reason: why it did not run.
    """

    layout: str
    engine: str
    outcome: Outcome | None
    alone: Outcome | None
    ours: Outcome | None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Mean acceptance length over ours."""
        if self.outcome is None or self.ours is None:
            return None
        mine, theirs = self.ours.mean_acceptance_length, self.outcome.mean_acceptance_length
        return theirs / mine if mine and theirs else None

    @property
    def agrees(self) -> bool:
        """Whether the engine accepts what we do, within the tolerance."""
        return self.ratio is not None and abs(self.ratio - 1.0) <= TOLERANCE

    @property
    def speedup(self) -> float | None:
        """Tokens per second over target-only decoding in the same engine."""
        return self.outcome.tokens_per_s / self.alone.tokens_per_s if self.outcome and self.alone else None

    def to_json(self) -> dict[str, Any]:
        """Plain data, the figures included."""
        return {**asdict(self), "ratio": self.ratio, "agrees": self.agrees, "speedup": self.speedup}


HEADER = ["draft", "engine", "loaded", "acceptance length", "over ours", "same answers", "tokens/s", "over alone"]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    return markdown_table(HEADER, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    if row.outcome is None:
        return [row.layout, row.engine, f"not run: {row.reason}", *["-"] * (len(HEADER) - 3)]
    length, ratio, speedup = row.outcome.mean_acceptance_length, row.ratio, row.speedup
    same = "-" if row.ours is None else f"{row.outcome.same_answers(row.ours)} of {len(row.outcome.tokens)}"
    return [
        row.layout,
        row.outcome.engine,
        "yes",
        "-" if length is None else f"{length:.3f}",
        "-" if ratio is None else f"{ratio:.3f}",
        same,
        f"{row.outcome.tokens_per_s:.1f}",
        "-" if speedup is None else f"{speedup:.2f}x",
    ]
