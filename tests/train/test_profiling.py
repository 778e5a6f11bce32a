"""Profiled steps: a table of where their time went, and nothing where none are asked for."""

import json
from pathlib import Path

from tests.train import tiny
from train.profiling import PROFILE_FILE


def test_the_steps_asked_for_leave_a_table(tmp_path: Path) -> None:
    tiny.run(tmp_path, tiny.network(), profile_steps=2)
    table = json.loads((tmp_path / PROFILE_FILE).read_text())
    assert table["total_ms"] > 0.0
    assert table["rows"] == sorted(table["rows"], key=lambda row: -row["ms"])
    assert any("addmm" in row["name"] or "linear" in row["name"] for row in table["rows"])
    assert table["collectives_ms"] == 0.0  # one process talks to nobody


def test_a_run_that_ends_while_it_is_watched_leaves_what_was_seen(tmp_path: Path) -> None:
    tiny.run(tmp_path, tiny.network(), steps=4, profile_steps=50)
    assert json.loads((tmp_path / PROFILE_FILE).read_text())["rows"]


def test_profiling_changes_no_weight(tmp_path: Path) -> None:
    watched, plain = tiny.network(), tiny.network()
    tiny.run(tmp_path / "a", watched, profile_steps=2)
    tiny.run(tmp_path / "b", plain)
    assert tiny.equal(tiny.weights(watched), tiny.weights(plain))
    assert not (tmp_path / "b" / PROFILE_FILE).exists()
