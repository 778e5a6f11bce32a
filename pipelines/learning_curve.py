"""Whether a draft would gain from more training: expected tau against steps and tokens, fitted, and what lies ahead.

    python -m pipelines.learning_curve artifacts/draft/0123abcd --out learning_curve.png
    python -m pipelines.learning_curve artifacts/draft/*/history.json --ahead 2,5 --block 4

Reads the `history.json` of trained drafts, whose evaluations are teacher-forced on validation conversations; with
`trainer.evaluate_every_steps` there are enough of them for a fit. What a fit means is said in `pipelines.learning_fit`.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.errors import InputError
from pipelines.artifacts import MANIFEST
from pipelines.build import HISTORY_FILE
from pipelines.files import read_json, replacing
from pipelines.learning_fit import AHEAD, FEWEST, Fit, Measured, fit_curve, foretold, measured, proposed
from pipelines.report import interval, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS, TOKENS = "steps", "supervised tokens"
_BLOCK = 4
"""Block of a draft whose evaluation tells the acceptance of single tokens."""


@dataclass(frozen=True)
class Curve:
    """The evaluations of one training and their fits.

    Attributes:
        name: of the draft.
        points: evaluations.
        most: that tau cannot exceed.
    """

    name: str
    points: list[Measured]
    most: float

    def along(self, axis: str) -> tuple[list[float], list[float]]:
        """Places and values along steps or tokens; without values where the history does not tell the tokens."""
        if axis == STEPS:
            return [p.step for p in self.points], [p.tau for p in self.points]
        known = [p for p in self.points if p.supervised is not None]
        return [float(p.supervised or 0.0) for p in known], [p.tau for p in known]

    def fit(self, axis: str) -> Fit | None:
        """The curve through the evaluations."""
        return fit_curve(*self.along(axis), most=self.most)


def read_curve(path: Path, *, block: int) -> Curve:
    """Read a draft's history.

    Args:
        path: folder of the draft's artifact or of a published version, or the file itself.
        block: of drafts whose evaluation tells the acceptance of single tokens alone.

    Raises:
        InputError: there is no history, or it holds no evaluation.
    """
    file = path / HISTORY_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError("no history of a training", where=str(file), mend="give the folder of a trained draft")
    history: list[dict[str, Any]] = read_json(file)
    points = measured(history, block=block)
    if not points:
        raise InputError("the history has no evaluation", where=str(file), mend="train with validation conversations")
    known = proposed(history) or (0 if any("eval/tau" in line for line in history) else block)
    return Curve(_name(file.parent), points, 1.0 + known if known else math.inf)


def _name(folder: Path) -> str:
    """The draft's kind with the folder's, where a manifest tells it."""
    manifest = folder / MANIFEST
    kind = read_json(manifest).get("metrics", {}).get("kind", "") if manifest.is_file() else ""
    return f"{kind} {folder.name}".strip()


def curve_markdown(curves: Sequence[Curve], *, ahead: Sequence[float] = AHEAD) -> str:
    """A table along steps and one along tokens, and how well each curve would have foretold its own end."""
    text = (
        "# Learning curves\n\ntau is expected from teacher-forced validation acceptance at temperature 1. Fitted is "
        "a - b * n^-c; in brackets 95 % intervals of the curve, noise taken as independent. They hold for trainings "
        "like this one: where the rate falls to the end of a run, its last evaluations are lifted, and a longer run "
        "is lifted later.\n"
    )
    for axis in (STEPS, TOKENS):
        header = [
            "draft",
            "evaluations",
            f"last {axis}",
            "tau",
            "c",
            "noise",
            *(f"at {_times(a)}" for a in ahead),
            "ceiling",
        ]
        rows = [_row(curve, axis, ahead) for curve in curves if curve.along(axis)[0]]
        if rows:
            text += f"\n## Against {axis}\n\n{markdown_table(header, rows)}"
    lines = [line for curve in curves if (line := _backtest(curve))]
    return text + ("\n" + "".join(f"{line}\n" for line in lines) if lines else "")


def _times(ahead: float) -> str:
    return f"{ahead:g} times"


def _row(curve: Curve, axis: str, ahead: Sequence[float]) -> list[str]:
    at, values = curve.along(axis)
    fit = curve.fit(axis)
    start = [curve.name, str(len(at)), f"{at[-1]:,.0f}", f"{values[-1]:.3f}"]
    if fit is None:
        return [*start, *["-"] * (2 + len(ahead)), f"fewer than {FEWEST} evaluations"]
    there = [_said(fit, a * at[-1]) for a in ahead]
    return [*start, f"{fit.power:.2f}", f"{fit.noise:.3f}", *there, _said(fit, math.inf)]


def _said(fit: Fit, n: float) -> str:
    found = fit.estimate(n)
    if found.low is None or found.high is None:
        ends = ["open" if end is None else f"{end:.2f}" for end in (found.low, found.high)]
        return f"{found.value:.2f} [{', '.join(ends)}]"
    return interval(found)


def _backtest(curve: Curve) -> str:
    """How the first half foretold the end."""
    at, values = curve.along(STEPS)
    known = foretold(at, values, most=curve.most)
    if known is None:
        return ""
    said, was = known
    held = said.low is not None and said.high is not None and said.low <= was <= said.high
    return (
        f"{curve.name}: the evaluations up to half of the steps foretell {interval(said)} for the last one, which was "
        f"{was:.3f}: {'inside' if held else 'outside'}."
    )


def curve_plot(curves: Sequence[Curve], path: Path, *, ahead: Sequence[float] = AHEAD) -> None:
    """Draw evaluations, fits and what lies ahead with its interval; one panel along steps, one along tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [axis for axis in (STEPS, TOKENS) if any(curve.along(axis)[0] for curve in curves)]
    figure, panels = pyplot.subplots(
        1, len(axes), figsize=(6.5 * len(axes), 4), constrained_layout=True, squeeze=False, sharey=True
    )
    for panel, axis in zip(panels[0], axes, strict=True):
        for number, curve in enumerate(curves):
            _draw(panel, curve, axis, ahead, colour=f"C{number}")
        panel.set_xscale("log")
        panel.set_xlabel(axis)
        panel.grid(color="0.9")
    panels[0][0].set_ylabel("expected tau, teacher-forced")
    panels[0][0].legend(fontsize="small")
    with replacing(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    pyplot.close(figure)


def _draw(panel: "Axes", curve: Curve, axis: str, ahead: Sequence[float], *, colour: str) -> None:
    at, values = curve.along(axis)
    panel.plot(at, values, "o", ms=4, color=colour, label=curve.name)
    fit = curve.fit(axis)
    if fit is None:
        return
    farthest = at[-1] * max(ahead)
    many = [at[0] * (farthest / at[0]) ** (place / 60) for place in range(61)]
    panel.plot(many, [min(fit.value(n), fit.most) for n in many], "-", lw=1, color=colour)
    beyond = [n for n in many if n >= at[-1]][::6]
    found = [fit.estimate(n) for n in beyond]
    closed = [
        (n, e.low, e.high) for n, e in zip(beyond, found, strict=True) if e.low is not None and e.high is not None
    ]
    if closed:
        places, low, high = zip(*closed, strict=True)
        panel.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _factors(text: str) -> tuple[float, ...]:
    """Numbers above 1 with commas between them."""
    found = tuple(float(word) for word in text.split(","))
    if not all(1.0 < factor < math.inf for factor in found):
        raise argparse.ArgumentTypeError("use numbers above 1, as in 2,4,10")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: exit code 0 with the tables on standard output, 2 with one line for bad input."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.learning_curve", description=__doc__.splitlines()[0])
    parser.add_argument("drafts", type=Path, nargs="+", help="folders of trained drafts, or their history.json")
    parser.add_argument("--out", type=Path, default=Path("learning_curve.png"), help="picture to write")
    parser.add_argument("--ahead", type=_factors, default=AHEAD, help="times the last steps (default: 2,4,10)")
    parser.add_argument(
        "--block", type=int, default=_BLOCK, help="tokens a round of drafts that are scored by single tokens"
    )
    words = parser.parse_args(argv)
    try:
        curves = [read_curve(path, block=words.block) for path in words.drafts]
        curve_plot(curves, words.out, ahead=words.ahead)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(curve_markdown(curves, ahead=words.ahead))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
