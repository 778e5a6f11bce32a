"""Drawings take the page's colours and fonts, hold nothing of anyone else's, and show names as they are."""

import re
from pathlib import Path

import pytest

from inference.statistics import Estimate
from pipelines.version_report.chart import BARS, FOREST, LINES, POINTS, STACKED, Chart, Series, exact
from pipelines.version_report.drawing import ROLES, SERIES, png, svg

KINDS = (LINES, POINTS, BARS, STACKED, FOREST)


def chart(kind: str = LINES, *, name: str = "one", many: int = 1, key: str = "key", **options: object) -> Chart:
    """A figure with an interval and a value without one."""
    series = tuple(
        Series(f"{name}{'' if number == 0 else number}", (0.0, 1.0), (Estimate(0.5, 0.4, 0.7), exact(0.25)))
        for number in range(many)
    )
    if kind == POINTS:
        series = tuple(Series(one.name, one.x[:1], one.y[:1]) for one in series)
    categories = ("first", "second") if kind in (BARS, STACKED, FOREST) else ()
    return Chart(key, "Title", "Sentence", kind, "across", "up", series, categories, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_has_its_labels_as_text_and_no_colour_of_its_own(kind: str) -> None:
    text = svg(chart(kind, many=3))
    assert text.startswith("<svg viewBox=") and "across</text>" in text
    colours = set(re.findall(r"#[0-9a-fA-F]{6}", text))
    assert not colours & {*ROLES.values(), *SERIES.values()}
    # Black and white are left where nothing shows: the clip and the hidden patches.
    assert colours <= {"#ffffff", "#000000"}, colours
    assert "var(--ink)" in text and "var(--s1)" in text


def test_nothing_is_fetched_and_no_style_leaks() -> None:
    text = svg(chart())
    assert "http" not in text and "<style" not in text and "<script" not in text and "metadata" not in text


def test_ids_of_two_figures_differ_and_every_reference_has_its_target() -> None:
    first, second = svg(chart(STACKED, many=3, key="a")), svg(chart(STACKED, many=3, key="b"))
    ids = [set(re.findall(r'\bid="([^"]*)"', text)) for text in (first, second)]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', first))
    assert used and used <= ids[0]


def test_the_same_figure_is_drawn_the_same_way_twice() -> None:
    assert svg(chart(many=2)) == svg(chart(many=2))


def test_names_are_text_and_not_markup_or_mathematics() -> None:
    text = svg(chart(many=2, name="<i>$x^2$"))
    assert "&lt;i&gt;$x^2$</text>" in text and "<i>" not in text
    assert "\u6f22" in svg(chart(many=2, name="\u6f22"))  # in no font of matplotlib's, and no warning


def test_long_names_leave_room_and_numbers_in_labels_stay_whole() -> None:
    text = svg(chart(many=2, name="n" * 60))
    assert "n" * 19 + "..." in text and "n" * 23 not in text
    fine = Chart("k", "", "", LINES, "x", "y", (Series("a", (0, 1), (exact(0.3701), exact(0.3709))),))
    assert re.search(r">0\.370[0-9]</text>", svg(fine)), "coordinates are rounded, and no words"


def test_series_differ_by_more_than_colour() -> None:
    text = svg(chart(STACKED, many=3))
    assert len(set(re.findall(r"url\(#(key-h[^)]*)\)", text))) == 2, "all but the first are hatched, each its own way"
    lines = svg(chart(LINES, many=3))
    assert len(set(re.findall(r"stroke-dasharray: ([0-9.,]+)", lines))) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_written_whole(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "figure.png"
    png(chart(kind, many=2, reference=1.0), path)
    assert path.read_bytes().startswith(b"\x89PNG") and list(path.parent.iterdir()) == [path]
