"""The picture shows the report's own figures, and is whole or absent."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from inference.calibration import Calibration
from inference.reliability import BetterSource, Bin, CalibrationReport, PositionReport
from inference.statistics import Estimate
from pipelines.calibration_plot import plot_reliability, title

NONE = Estimate(float("nan"), None, None)


def _position(number: int) -> PositionReport:
    return PositionReport(
        position=number,
        proposed=30,
        observations=20,
        error_before=Estimate(0.1234, 0.1, 0.15),
        error_after=Estimate(0.0123, 0.01, 0.02),
        auc=Estimate(0.8765, 0.8, 0.9),
        margin_auc=NONE,
        before=(Bin(0.5, 0.25, 15), Bin(0.9, 0.5, 15)),
        after=(Bin(0.3, 0.25, 20), Bin(0.6, 0.5, 10)),
    )


def _report(positions: int) -> CalibrationReport:
    source = BetterSource("confidence", 0, float("nan"), float("nan"), NONE)
    return CalibrationReport(Calibration(), tuple(_position(k + 1) for k in range(positions)), source)


@pytest.mark.parametrize("positions", [0, 1, 4, 6])
def test_the_picture_is_written(positions: int, tmp_path: Path) -> None:
    path = tmp_path / "new" / "reliability.png"
    plot_reliability(_report(positions), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path], "nothing is left aside"


def test_the_title_has_auc_and_both_errors() -> None:
    assert title(_position(3)) == "position 3: AUC 0.88\nECE 0.123 -> 0.012"


def test_panels_show_both_curves_and_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot_reliability(_report(6), tmp_path / "reliability.png")
    monkeypatch.undo()
    [figure] = figures
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [title(_position(k)) for k in range(1, 7)]
    curves = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in panels[5].lines}
    assert curves["before"] == [[0.5, 0.25], [0.9, 0.5]]
    assert curves["after"] == [[0.3, 0.25], [0.6, 0.5]]
    bars = [[bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)] for axes in figure.axes]
    assert [heights for heights in bars if heights] == [[20, 10]] * 6
    pyplot.close(figure)


def test_a_failure_leaves_the_older_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reliability.png"
    path.write_bytes(b"older")

    def torn(self: Figure, where: Path, **_: object) -> None:
        where.write_bytes(b"half")
        raise RuntimeError("torn")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(RuntimeError, match="torn"):
        plot_reliability(_report(1), path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
