"""Learning curves: fitted to made-up histories whose law is known, and told in a table and a picture."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.learning_curve import Curve, curve_markdown, main, read_curve
from pipelines.learning_fit import FEWEST, Measured, fit_curve, foretold, measured, proposed

STEPS = [float(step) for step in range(200, 4001, 200)]


def law(n: float) -> float:
    """tau of 2.6 in the end."""
    return 2.6 - 8.0 * n**-0.4


def history(steps: list[float] = STEPS, **more: float) -> list[dict[str, Any]]:
    """As training writes it: a logged line and an evaluation at every step."""
    lines: list[dict[str, Any]] = []
    for step in steps:
        lines.append({"step": int(step), "supervised": int(50 * step), "loss": 1.0, "acceptance": 0.5})
        lines.append({"step": int(step), "supervised": int(50 * step), "eval/tau": law(step), **more})
    return lines


def test_without_noise_the_law_is_found() -> None:
    fit = fit_curve(STEPS, [law(n) for n in STEPS])
    assert fit is not None
    assert (fit.ceiling, fit.power) == (pytest.approx(2.6, abs=0.02), pytest.approx(0.4, abs=0.02))
    for n in (*STEPS, 8000.0, 40_000.0):
        assert fit.value(n) == pytest.approx(law(n), abs=0.01)
    ahead = fit.estimate(8000.0)
    assert ahead.low is not None and ahead.high is not None
    assert ahead.high - ahead.low < 0.02


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draws, held = 60, {8000.0: 0, 40_000.0: 0, math.inf: 0}
    for seed in range(draws):
        noise = np.random.default_rng(seed).normal(0.0, 0.01, len(STEPS))
        fit = fit_curve(STEPS, [law(n) + float(e) for n, e in zip(STEPS, noise, strict=True)])
        assert fit is not None
        for n in held:
            found, truth = fit.estimate(n), 2.6 if math.isinf(n) else law(n)
            held[n] += (found.low is None or found.low <= truth) and (found.high is None or truth <= found.high)
    # of 60 draws 57 at 95 %; 50 are left by less than one chance in a thousand
    assert all(count >= 50 for count in held.values()), held


def test_an_interval_widens_with_what_lies_ahead() -> None:
    noise = np.random.default_rng(3).normal(0.0, 0.01, len(STEPS))
    fit = fit_curve(STEPS, [law(n) + float(e) for n, e in zip(STEPS, noise, strict=True)])
    assert fit is not None
    widths = [(e.high or 0.0) - (e.low or 0.0) for e in (fit.estimate(n) for n in (4000.0, 8000.0, 40_000.0))]
    assert widths == sorted(widths) and widths[0] > 0


def test_a_line_that_still_rises_has_no_end_above_but_what_a_block_can_hold() -> None:
    values = [1.0 + 0.1 * n for n in range(1, 9)]
    at = [float(n) for n in range(1, 9)]
    free, bound = fit_curve(at, values), fit_curve(at, values, most=3.0)
    assert free is not None and bound is not None
    end = free.estimate(math.inf).high
    assert end is None or end > 3.0
    assert (bound.estimate(math.inf).value, bound.estimate(math.inf).high) == (3.0, 3.0)


def test_a_curve_never_falls() -> None:
    fit = fit_curve(STEPS, [2.0 - 0.01 * i for i in range(len(STEPS))])
    assert fit is not None
    assert (fit.span, fit.value(1e9)) == (0.0, pytest.approx(fit.ceiling))


def test_few_evaluations_make_no_fit() -> None:
    few = STEPS[: FEWEST - 1]
    assert fit_curve(few, [law(n) for n in few]) is None
    assert foretold(STEPS[:8], [law(n) for n in STEPS[:8]]) is None, "four of them before the half"


def test_the_first_half_foretells_the_last_evaluation() -> None:
    known = foretold(STEPS, [law(n) for n in STEPS])
    assert known is not None
    said, was = known
    assert was == law(4000.0) and said.value == pytest.approx(was, abs=0.01)


def test_evaluations_are_read_from_a_history() -> None:
    lines = [*history([1, 2]), {"step": 3, "eval/tau": "NaN"}, {"step": 4, "eval/tau": 1.5}]
    assert measured(lines) == [Measured(1, 50, law(1)), Measured(2, 100, law(2)), Measured(4, None, 1.5)]
    assert proposed([{"eval/acceptance_1": 0.5, "eval/acceptance_3": 0.4, "eval/acceptance_chat": 0.4}]) == 3


def test_acceptance_of_single_tokens_stands_for_a_chain() -> None:
    lines = [{"step": 5, "supervised": 9, "eval/acceptance": 0.5}]
    assert measured(lines) == []
    assert measured(lines, block=2) == [Measured(5, 9.0, 1.75)]  # 1 + 1/2 + 1/4


def test_tables_tell_steps_tokens_and_the_test_on_itself() -> None:
    noise = np.random.default_rng(1).normal(0.0, 0.005, len(STEPS))
    points = [Measured(n, 50 * n, law(n) + float(e)) for n, e in zip(STEPS, noise, strict=True)]
    text = curve_markdown([Curve("dspark", points, most=8.0)], ahead=(2.0,))
    assert "| dspark | 20 | 4,000 |" in text and "| dspark | 20 | 200,000 |" in text
    assert "at 2 times" in text
    assert "foretell 2.3" in text and "inside." in text
    few = curve_markdown([Curve("dspark", measured(history(STEPS[:2])), most=8.0)])
    assert "fewer than 5 evaluations" in few


def test_the_command_writes_a_picture_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "0123"
    folder.mkdir()
    (folder / "history.json").write_text(json.dumps(history(**{"eval/acceptance_7": 0.3})), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps({"metrics": {"kind": "dspark"}}), encoding="utf-8")
    (tmp_path / "few.json").write_text(json.dumps([{"step": 9, "eval/acceptance": 0.5}]), encoding="utf-8")
    out = tmp_path / "curve.png"
    assert main([str(folder), str(tmp_path / "few.json"), "--out", str(out), "--ahead", "2,5"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "| dspark 0123 | 20 |" in said and "at 5 times" in said
    assert read_curve(folder, block=4).most == 8.0


@pytest.mark.parametrize(
    ("lines", "said"), [(None, "no history of a training"), ([{"step": 1, "loss": 1.0}], "has no evaluation")]
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[dict[str, Any]] | None, said: str
) -> None:
    if lines is not None:
        (tmp_path / "history.json").write_text(json.dumps(lines), encoding="utf-8")
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert said in capsys.readouterr().err
