"""Charts drawn by matplotlib: as SVG for a page, in the page's own colours and fonts, or as PNG.

Colours of the light theme stand for roles. In SVG each is replaced by a CSS variable of the page, so that one drawing
serves light, dark and print. Series differ by marker, line or hatch as well as by colour.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.files import replacing
from pipelines.version_report.chart import BARS, FOREST, LINES, POINTS, STACKED, Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROLES = {"--ink": "#1c2430", "--soft": "#5b6675", "--line": "#d5dae1"}
SERIES = {
    "--s1": "#0067a5",
    "--s2": "#c04e00",
    "--s3": "#007a5a",
    "--s4": "#a8447f",
    "--s5": "#8a6a00",
    "--s6": "#3f8fc4",
    "--s7": "#6b6f78",
    "--s8": "#7a4fb5",
}
"""Role -> colour in the light theme. No two are equal, so that each names its role in a drawing."""

_COLOURS = tuple(SERIES.values())
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")
_HATCHES = ("", "///", "..", "\\\\\\", "xx", "++", "oo", "--")
_WIDTH = 4.7
_LONGEST_LABEL = 22

_SETTINGS: Any = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.edgecolor": ROLES["--soft"],
    "axes.labelcolor": ROLES["--ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": ROLES["--ink"],
    "xtick.color": ROLES["--soft"],
    "ytick.color": ROLES["--soft"],
    "xtick.labelcolor": ROLES["--ink"],
    "ytick.labelcolor": ROLES["--ink"],
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def _style() -> Iterator[None]:
    """Text as text; nothing in a name is taken for mathematics; letters that a font lacks are no reason to warn."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def svg(chart: Chart) -> str:
    """A chart as an `<svg>` element for an HTML page, its colours the page's variables, its ids its own."""
    with _style(), matplotlib.rc_context({"svg.hashsalt": chart.key}):
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _figure(chart).savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inlined(text.getvalue(), chart)


def png(chart: Chart, path: Path) -> None:
    """Write a chart as a picture in the colours of the light theme, with its title.

    Raises:
        InputError: it cannot be written.
    """
    with _style(), replacing(path) as aside:
        figure = _figure(chart)
        figure.suptitle(_short(chart.title, 60), fontsize=11)
        figure.savefig(aside, dpi=150, format="png")


def _inlined(text: str, chart: Chart) -> str:
    """Strip what a page has no use for, and tell the figures of one page apart."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{chart.key}-', text)
    text = re.sub(r'href="#', f'href="#{chart.key}-', text)
    text = text.replace("url(#", f"url(#{chart.key}-")
    # Two decimals are far below what a screen can show; only tags hold coordinates, the text between them is kept.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", " ".join(tag[0].split())), text)
    for name, colour in {**ROLES, **SERIES}.items():
        text = text.replace(colour, f"var({name})")
    # The size is the page's to give: the view box keeps the proportions.
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _figure(chart: Chart) -> Figure:
    horizontal = chart.kind in (BARS, STACKED, FOREST)
    rows = len(chart.categories) * (len(chart.series) if chart.kind == FOREST else 1.4)
    height = 1.3 + max(0.24 * rows, 0.9) if horizontal else 2.9
    if chart.unit_square:
        figure = Figure(figsize=(3.2, 3.4), layout="constrained")
    else:
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panel = figure.add_subplot()
    _draw(panel, chart)
    _axes(panel, chart)
    if len(chart.series) > 1:
        # Below the panel: nothing can lie on the data, however many series there are.
        columns = 1 if chart.unit_square else 5 if max(len(s.name) for s in chart.series) < 8 else 2
        figure.legend(loc="outside lower center", ncols=min(columns, len(chart.series)))
    return figure


def _draw(panel: "Axes", chart: Chart) -> None:
    if chart.reference is not None:
        draw = panel.axvline if chart.kind == FOREST else panel.axhline
        draw(chart.reference, color=ROLES["--soft"], linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    if chart.path:
        xs, ys = zip(*chart.path, strict=True)
        panel.plot(xs, ys, color=ROLES["--soft"], linewidth=1.0, linestyle="--", zorder=1)
    left = [0.0] * len(chart.categories)
    for place, one in enumerate(chart.series):
        if chart.kind in (BARS, STACKED):
            _bar(panel, one, place, left)
        elif chart.kind == FOREST:
            _forest(panel, one, place, len(chart.series))
        else:
            _line(panel, one, place, chart)


def _bar(panel: "Axes", one: Series, number: int, left: list[float]) -> None:
    """A stack's next part; `left` is moved on to its end."""
    places = [int(x) for x in one.x]
    panel.barh(
        places,
        [e.value for e in one.y],
        0.62,
        left=[left[place] for place in places],
        label=_short(one.name),
        color=_COLOURS[number % len(_COLOURS)],
        hatch=_HATCHES[number % len(_HATCHES)],
        edgecolor=ROLES["--line"],
        linewidth=0.5,
    )
    for place, estimate in zip(places, one.y, strict=True):
        left[place] += estimate.value


def _forest(panel: "Axes", one: Series, number: int, count: int) -> None:
    offset = (number - (count - 1) / 2) * 0.6 / count
    panel.errorbar(
        [e.value for e in one.y],
        [x + offset for x in one.x],
        xerr=_ends(one),
        fmt=_MARKERS[number % len(_MARKERS)],
        color=_COLOURS[number % len(_COLOURS)],
        label=_short(one.name),
        markersize=6,
        linewidth=1.6,
        capsize=2.5,
        zorder=3,
    )


def _line(panel: "Axes", one: Series, place: int, chart: Chart) -> None:
    """A curve with its intervals; neighbours at whole positions are moved apart, so that intervals stay readable."""
    number = place if one.look is None else one.look
    apart = 0.05 * (place - (len(chart.series) - 1) / 2) if chart.whole_x and chart.kind == LINES else 0.0
    many = len(one.x) > 40
    panel.errorbar(
        [x + apart for x in one.x],
        [e.value for e in one.y],
        yerr=_ends(one),
        marker="" if many else _MARKERS[number % len(_MARKERS)],
        linestyle="none" if chart.kind == POINTS else _LINES[number % len(_LINES)],
        color=_COLOURS[number % len(_COLOURS)],
        label=_short(one.name),
        markersize=8 if chart.kind == POINTS else 5,
        linewidth=1.5,
        elinewidth=1.1,
        capsize=2,
        zorder=3,
    )


def _ends(one: Series) -> list[list[float]] | None:
    """Lengths of the intervals below and above the values; none for a series without."""
    if all(e.low is None or e.high is None for e in one.y):
        return None
    below = [0.0 if e.low is None else max(0.0, e.value - e.low) for e in one.y]
    above = [0.0 if e.high is None else max(0.0, e.high - e.value) for e in one.y]
    return [below, above]


def _axes(panel: "Axes", chart: Chart) -> None:
    """Labels, grid and limits."""
    panel.grid(axis="x" if chart.categories else "both", color=ROLES["--line"], linewidth=0.6)
    panel.set_axisbelow(True)
    panel.set_xlabel(chart.x_label)
    if chart.categories:
        panel.set_yticks(range(len(chart.categories)), [_short(name) for name in chart.categories])
        panel.set_ylim(len(chart.categories) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
    else:
        panel.set_ylabel(chart.y_label)
    if chart.kind == POINTS:
        panel.margins(x=0.12)
    if chart.whole_x:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if chart.unit_square:
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1)
        panel.set_aspect("equal")


def _short(text: str, most: int = _LONGEST_LABEL) -> str:
    """A label that leaves room for the data."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
