"""What re-alignments leave behind, and what follows from it for the next one."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.realign import cycle
from pipelines.realign.cycle import GAVE_UP, KEPT, PROMOTED, Cycle, Ended, failures, history, must_wait, open_cycle

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def ended(number: int, outcome: str, *, when: datetime = NOON, target: str = "t") -> Ended:
    stamp = when.isoformat(timespec="seconds")
    return Ended(str(number), stamp, stamp, outcome, "because", "v1", "", target)


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle, "now", lambda: NOON)


def test_a_cycle_is_found_again_until_it_ends(tmp_path: Path) -> None:
    started = Cycle("c", "2026-05-01T12:00:00+00:00", "v1", "t", "s", 0, ["why"])
    cycle.begin(tmp_path, started)
    assert open_cycle(tmp_path) == started
    cycle.end(tmp_path, ended(1, PROMOTED))
    assert open_cycle(tmp_path) is None
    assert [one.id for one in history(tmp_path)] == ["1"]


def test_ending_twice_is_written_once(tmp_path: Path) -> None:
    for _ in range(2):
        cycle.end(tmp_path, ended(1, KEPT))
    assert len(history(tmp_path)) == 1


def test_failures_count_up_to_the_last_promotion_on_the_same_target() -> None:
    past = [ended(1, KEPT), ended(2, PROMOTED), ended(3, KEPT), ended(4, GAVE_UP)]
    assert failures(past, "t") == 2
    assert failures(past, "another") == 0


@pytest.mark.usefixtures("noon")
def test_it_cools_down_after_a_cycle() -> None:
    past = [ended(1, KEPT, when=NOON - timedelta(minutes=30))]
    assert "cooling down" in must_wait(past, cooldown_hours=1, max_per_day=4)
    assert must_wait(past, cooldown_hours=0.5, max_per_day=4) == ""


@pytest.mark.usefixtures("noon")
def test_a_day_has_so_many_cycles() -> None:
    past = [ended(i, KEPT, when=NOON - timedelta(hours=h)) for i, h in enumerate((30, 20, 10, 2))]
    assert "3 cycles in the last 24 hours" in must_wait(past, cooldown_hours=1, max_per_day=3)
    assert must_wait(past, cooldown_hours=1, max_per_day=4) == ""


def test_a_history_changed_by_hand_is_named(tmp_path: Path) -> None:
    cycle.end(tmp_path, ended(1, KEPT))
    (tmp_path / cycle.FOLDER / cycle.HISTORY_FILE).write_text("{}\n")
    with pytest.raises(InputError, match="unreadable history"):
        history(tmp_path)
