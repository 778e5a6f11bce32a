"""Results of the benchmark for people: one Markdown file and log-log pictures. Computes no figure."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from pipelines.bench.outcome import Figure, Outcome, Picture
from pipelines.files import replacing
from pipelines.report import markdown_table
from pipelines.version_report.drawing import ROLES, SERIES

_MARKERS = ("o", "s", "^", "D", "v", "P")
_LINES = ("-", "--", "-.", ":")


def markdown(head: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> str:
    """The whole report.

    Args:
        head: what `bench.json` says besides the rows.
        outcomes: by row.
    """
    code, load = head["provenance"]["code"], head["load_average"]
    packages = head["provenance"]["packages"]
    commit = f"{code['commit'] or 'none'}{' with changes' if code['dirty'] else ''}"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("python", "torch", "transformers") if name in packages)
    lines = [
        "# Benchmark\n",
        f"{head['device']}; {versions}; commit {commit}; {head['started']}; load average {load:.2f} at the start.\n",
        f"    {head['command']}\n",
        "A ratio is of sums over the same prompts or rounds, arms in turns in shuffled order, with its 95 % bootstrap "
        "interval.\n",
        markdown_table(
            ["row", "figure", "value", "goal", ""],
            [_cells(row, figure) for row, outcome in outcomes.items() for figure in outcome.figures],
        ),
        *(_section(row, outcome) for row, outcome in outcomes.items()),
    ]
    return "\n".join(lines)


def _cells(row: str, figure: Figure) -> list[str]:
    goal = "" if figure.goal is None else str(figure.goal)
    return [row, figure.name, f"{figure.estimate} {figure.unit}".rstrip(), goal, figure.verdict]


def _section(row: str, outcome: Outcome) -> str:
    lines = [f"## {row}\n", *(f"- {note}" for note in outcome.notes)]
    if outcome.notes:
        lines.append("")
    for figure in outcome.figures:
        if figure.detail:
            lines += [f"- {figure.name}: {_said(figure.detail)}"]
    lines += [f"\n![{picture.title}]({picture.key}.png)" for picture in outcome.pictures]
    return "\n".join(lines) + "\n"


def _said(value: Any) -> str:
    """Plain data in a line."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key} ({_said(v)})" if isinstance(v, Mapping) else f"{key} {_said(v)}" for key, v in value.items()
        )
    if isinstance(value, (list, tuple)):
        return " ".join(_said(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(picture: Picture, path: Path) -> None:
    """Write a log-log plot as PNG.

    Raises:
        InputError: it cannot be written.
    """
    canvas = Canvas(figsize=(5.4, 3.6), layout="constrained")
    panel = canvas.add_subplot()
    for number, curve in enumerate(picture.curves):
        panel.plot(
            curve.sizes,
            curve.values,
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_LINES[number % len(_LINES)],
            color=tuple(SERIES.values())[number % len(SERIES)],
            label=curve.name,
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    sizes = sorted({size for curve in picture.curves for size in curve.sizes})
    panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
    panel.minorticks_off()
    values = [value for curve in picture.curves for value in curve.values]
    ticks = _ticks(min(values), max(values))
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.grid(color=ROLES["--line"], linewidth=0.6)
    panel.set_xlabel(picture.x_label)
    panel.set_ylabel(picture.y_label)
    panel.set_title(picture.title, fontsize=10.5)
    # Below the panel, where it lies on no curve.
    canvas.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    with replacing(path) as aside:
        canvas.savefig(aside, dpi=150, format="png")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis from below one value to above another: 1, 2 and 5 of each power of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    below = max(tick for tick in every if tick <= low * (1 + 1e-9))
    above = min(tick for tick in every if tick >= high * (1 - 1e-9))
    return [tick for tick in every if below <= tick <= above]
