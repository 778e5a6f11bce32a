"""Tables and picture show the scorecard's own figures, and a dash where there is none."""

from pathlib import Path

import pytest

from inference.block_length import BlockChoice
from inference.statistics import Estimate, Scorecard, scorecards
from pipelines.report import interval, markdown_table, scorecard_markdown, scorecard_plot, scorecard_rows
from tests.pipelines.test_decisions import Made, made

BLOCKS = {"pruned": BlockChoice(4, [0.5], 0.001, [1.1])}


@pytest.fixture(scope="module")
def cards() -> list[Scorecard]:
    return scorecards(made({"pruned": Made(2.0, 12.0, mib=50)}))


def test_a_figure_is_shown_with_its_interval() -> None:
    assert interval(Estimate(1.234, 1.0, 1.5)) == "1.23 [1.00, 1.50]"
    assert interval(None) == "-"


def test_a_table_has_a_line_for_each_row() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_the_summary_has_every_arm_domain_and_temperature(cards: list[Scorecard]) -> None:
    header, rows = scorecard_rows(cards)
    assert len(rows) == 2 * 4 * 3  # arms x (three domains, overall) x (two temperatures, all)
    [row] = [dict(zip(header, r, strict=True)) for r in rows if r[:3] == ["pruned", "overall", "all"]]
    assert row["tau"] == "2.00 [2.00, 2.00]" and row["draft MiB"] == "50"
    assert row["speedup"].startswith("1.6") or row["speedup"].startswith("1.7")  # 10 ms against 12 / 2 = 6 ms a token
    [base] = [dict(zip(header, r, strict=True)) for r in rows if r[:3] == ["none", "overall", "all"]]
    assert base["alpha"] == "-" and base["speedup"] == "1.00 [1.00, 1.00]"


def test_the_page_shows_acceptance_by_position_and_milliseconds_by_part(cards: list[Scorecard]) -> None:
    page = scorecard_markdown(cards, BLOCKS, {"pruned": dict.fromkeys(("read", "block", "slots", "draw"), 0.0015)})
    assert "| pruned | all | 4 | 1.00 |" in page, "30 of 30 proposals stood at position 1, in blocks of 4"
    assert "| none | all | 0.0 | 0.0 | 10.0 |" in page, "prefill, draft, verify: the baseline's 10 ms"
    assert "| pruned | 4 | 1.50 | 1.50 | 1.50 | 1.50 |" in page
    assert page.count("\n## ") == 3
    assert scorecard_markdown(cards, BLOCKS, {}).count("\n## ") == 2


def test_the_picture_is_written(cards: list[Scorecard], tmp_path: Path) -> None:
    scorecard_plot(cards, tmp_path / "scorecard.png")
    assert (tmp_path / "scorecard.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_the_baseline_alone_is_written_too(tmp_path: Path) -> None:
    scorecard_plot(scorecards(made({})), tmp_path / "scorecard.png")
    assert (tmp_path / "scorecard.png").stat().st_size > 1000
