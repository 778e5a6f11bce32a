"""A picture of a calibration: one small reliability diagram per position. Computes no figure of its own.

plot_reliability(report(rounds_for_fit, rounds_for_test), folder / "reliability.png")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inference.reliability import Bin, CalibrationReport, PositionReport
from pipelines.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_INCHES = 3.2


def plot_reliability(report: CalibrationReport, path: Path) -> None:
    """Draw, per position, observed prefix survival over predicted, before and after calibration, and the counts.

    Args:
        report: figures to show.
        path: PNG to write, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(_COLUMNS, max(1, len(report.positions)))
    rows = max(1, -(-len(report.positions) // columns))
    size = (_INCHES * columns, _INCHES * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    panels: list[Axes] = list(grid.flat)
    for panel, position in zip(panels, report.positions, strict=False):
        _draw(panel, position)
    for panel in panels[len(report.positions) :]:
        panel.set_axis_off()
    figure.supxlabel("predicted chance that the prefix survives", fontsize="small")
    figure.supylabel("observed share", fontsize="small")
    if report.positions:
        panels[0].legend(fontsize="x-small", loc="upper left")
    with replacing(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    pyplot.close(figure)


def title(position: PositionReport) -> str:
    """AUC and calibration errors of one position, in two lines."""
    before, after = position.error_before.value, position.error_after.value
    return f"position {position.position}: AUC {position.auc.value:.2f}\nECE {before:.3f} -> {after:.3f}"


def _draw(panel: "Axes", position: PositionReport) -> None:
    """One diagram: curves on the left scale, rounds per bin (after calibration) as bars on the right one."""
    counts = panel.twinx()
    counts.bar([b.predicted for b in position.after], [b.num_outcomes for b in position.after], 0.02, color="0.85")
    # The bars take the lower third of the panel, behind the curves.
    counts.set_ylim(0, 3 * max(b.num_outcomes for b in position.after))
    counts.tick_params(labelsize="x-small", colors="0.5")
    panel.set_zorder(counts.get_zorder() + 1)
    panel.patch.set_visible(False)
    panel.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    _curve(panel, position.before, label="before", color="tab:orange")
    _curve(panel, position.after, label="after", color="tab:blue")
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1)
    panel.tick_params(labelsize="x-small")
    panel.set_title(title(position), fontsize="small")


def _curve(panel: "Axes", bins: Sequence[Bin], *, label: str, color: str) -> None:
    panel.plot(
        [b.predicted for b in bins], [b.observed for b in bins], marker="o", markersize=3, label=label, color=color
    )
