"""Figures show the scorecards' own numbers, and a version that lacks something has fewer figures, not broken ones."""

import math
from pathlib import Path

import pytest

from inference.statistics import Estimate, find_card
from pipelines.version_report.chart import POINTS, Chart, Series, exact, shown
from pipelines.version_report.charts import charts
from pipelines.version_report.charts_speed import frontier
from pipelines.version_report.contents import Contents, read_contents
from tests.pipelines.test_decisions import Made
from tests.pipelines.version_report.versions import add_everything, write, write_version


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """A version with everything."""
    root = tmp_path_factory.mktemp("registry")
    folder = write_version(root)
    add_everything(folder, root)
    return read_contents(folder, registry=root)


def drawn(contents: Contents) -> dict[str, Chart]:
    """Every figure by its key."""
    found = [chart for section in charts(contents).values() for chart in section]
    assert len({chart.key for chart in found}) == len(found), "keys name files and places in the page"
    return {chart.key: chart for chart in found}


def test_a_version_with_everything_has_every_figure(contents: Contents) -> None:
    assert set(drawn(contents)) == {
        *("speedup", "speedup-memory", "speedup-training", "speedup-domains"),
        *("acceptance-drafts", "acceptance-temperatures", "acceptance-domains"),
        *("seconds", "prefill", "reliability-1", "reliability-2", "learning-loss", "learning-acceptance"),
        *("load", "gates"),
    }


def test_figures_are_the_scorecards_own(contents: Contents) -> None:
    chart = drawn(contents)["speedup"]
    assert chart.categories == ("fast", "slow"), "fastest first, without the baseline"
    greedy = chart.series[0]
    assert greedy.name == "temperature 0"
    assert greedy.y[0] == find_card(contents.cards, "fast", temperature=0.0).speedup
    positions = drawn(contents)["acceptance-drafts"]
    by_name = {one.name: one for one in positions.series}
    assert list(by_name["slow"].y) == find_card(contents.cards, "slow").conditional and by_name["slow"].x == (1,)


def test_seconds_are_milliseconds_by_part(contents: Contents) -> None:
    chart = drawn(contents)["seconds"]
    parts = {one.name: one for one in chart.series}
    assert list(parts) == ["draft", "verify", "accept", "cache", "other"]
    base = chart.categories.index("none")
    assert parts["verify"].y[base].value == pytest.approx(10.0, rel=0.1), "the baseline's 10 ms"


def test_the_frontier_is_what_nothing_cheaper_reaches() -> None:
    assert frontier([(0, 1.0), (20, 1.6), (50, 1.5), (60, 1.7), (0, 0.9)]) == [(0, 1.0), (20, 1.6), (60, 1.7)]


def test_costs_are_drawn_with_the_frontier_and_one_look_a_draft(contents: Contents) -> None:
    figures = drawn(contents)
    memory, training = figures["speedup-memory"], figures["speedup-training"]
    assert memory.sentence.startswith("No cheaper draft is as fast as these: fast, none")
    assert {one.name: one.x[0] for one in training.series} == {"fast": 10.0, "slow": 30.0, "none": 0.0}
    looks = [{one.name: one.look for one in chart.series} for chart in (memory, training)]
    assert looks[0] == looks[1] and len(set(looks[0].values())) == 3


def test_curves_and_gates_come_from_their_files(contents: Contents) -> None:
    figures = drawn(contents)
    assert [e.value for e in figures["learning-loss"].series[0].y] == [5.0, 2.5, 5.0 / 3]
    assert [one.name for one in figures["learning-acceptance"].series] == ["training", "evaluation"]
    assert figures["learning-loss"].sentence == "At the last step: training 1.667."
    [kept] = figures["gates"].series
    assert (kept.name, kept.y[0].value) == ("kept", 0.98)
    assert [e.value for e in figures["load"].series[0].y] == [1.5, 0.9]


def test_a_step_without_a_finite_loss_is_left_out(tmp_path: Path) -> None:
    folder = write_version(tmp_path)
    write(folder / "history.json", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "NaN"}, {"step": 3, "loss": 1.0}])
    [loss] = charts(read_contents(folder))["learning"]
    assert loss.series[0].x == (1, 3)


def test_reliability_is_shown_before_and_after(contents: Contents) -> None:
    chart = drawn(contents)["reliability-2"]
    assert [one.x for one in chart.series] == [(0.2, 0.8), (0.4, 0.9)]
    assert chart.sentence == "Calibration error 0.100 before and 0.020 after calibration, over 30 rounds."


def test_a_bare_version_has_the_figures_of_its_score(tmp_path: Path) -> None:
    sections = charts(read_contents(write_version(tmp_path)))
    assert [name for name, found in sections.items() if not found] == ["reliability", "learning", "load", "history"]
    assert [chart.key for chart in sections["speed"]] == ["speedup", "speedup-memory"]


def test_target_only_decoding_alone_has_only_its_seconds(tmp_path: Path) -> None:
    sections = charts(read_contents(write_version(tmp_path, {})))
    assert [chart.key for found in sections.values() for chart in found] == ["seconds", "prefill"]


def test_one_prompt_gives_figures_without_intervals(tmp_path: Path) -> None:
    figures = drawn(read_contents(write_version(tmp_path, {"fast": Made(2.0, 12.0)}, prompts=1)))
    estimates = [e for chart in figures.values() for one in chart.series for e in one.y]
    assert estimates and all(e.low is None for e in estimates)
    assert all("[" not in cell for chart in figures.values() for row in chart.table()[1] for cell in row)


def test_tables_have_every_value_drawn() -> None:
    two = (Series("a", (1.0, 2.0), (exact(0.5), Estimate(0.25, 0.2, 0.3))), Series("b", (2.0,), (exact(1.0),)))
    chart = Chart("k", "Title", "", "lines", "step", "loss", two)
    assert chart.table() == (
        ["step", "a", "b"],
        [["1", "0.50", "-"], ["2", "0.25 [0.20, 0.30]", "1.00"]],
    )
    points = Chart("k", "Title", "", POINTS, "MiB", "speedup", two[1:])
    assert points.table() == (["", "MiB", "speedup"], [["b", "2", "1.00"]])
    over = Chart("k", "Title", "", "bars", "ms", "draft", two[1:], categories=("x", "y", "z"))
    assert over.table() == (["draft", "b"], [["z", "1.00"]])


def test_what_is_no_number_is_shown_as_a_dash() -> None:
    assert shown(exact(math.nan)) == "-" and shown(Estimate(0.1234, 0.1, 0.2), 3) == "0.123 [0.10, 0.20]"


def test_expected_tau_is_drawn_with_its_fit_and_what_lies_ahead(tmp_path: Path) -> None:
    folder = write_version(tmp_path)
    rows = [{"step": s, "eval/tau": 2.6 - 8 * s**-0.4, "eval/acceptance_3": 0.5} for s in range(200, 2001, 200)]
    write(folder / "history.json", rows)
    [curve] = charts(read_contents(folder))["learning"]
    assert (curve.key, [one.name for one in curve.series]) == ("learning-curve", ["evaluations", "fitted"])
    assert curve.series[1].x[-3:] == (4000, 8000, 20_000)
    assert curve.series[1].y[-1].value == pytest.approx(2.6 - 8 * 20_000**-0.4, abs=0.02)
    assert curve.sentence.startswith("At the last of 10 evaluations: 2.217. Fitted is a - b * steps^-0.4")
    write(folder / "history.json", rows[:3])
    [bare] = charts(read_contents(folder))["learning"]
    assert [one.name for one in bare.series] == ["evaluations"]
    write(folder / "history.json", rows[:1])
    assert charts(read_contents(folder))["learning"] == []
