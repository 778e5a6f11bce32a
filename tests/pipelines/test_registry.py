"""Versions count up, aliases move in one step, and every move is in the log once."""

from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.registry import CHAMPION, alias_target, move_alias, next_version, read_events, roll_back, versions


def version(root: Path, name: str) -> None:
    (root / "pair" / name).mkdir(parents=True)


def moves(root: Path) -> list[tuple[str | None, str | None]]:
    return [(event["from"], event["to"]) for event in read_events(root)]


def test_versions_are_ordered_by_number_and_nothing_else_is_one(tmp_path: Path) -> None:
    assert versions(tmp_path, "pair") == [] and next_version(tmp_path, "pair") == "v1"
    for name in ("v2", "v10", "v9", ".partial-v11", "notes"):
        version(tmp_path, name)
    (tmp_path / "pair" / "champion").symlink_to("v9")
    assert [p.name for p in versions(tmp_path, "pair")] == ["v2", "v9", "v10"]
    assert next_version(tmp_path, "pair") == "v11"


def test_an_alias_moves_and_the_log_says_from_where(tmp_path: Path) -> None:
    version(tmp_path, "v1")
    version(tmp_path, "v2")
    assert alias_target(tmp_path, "pair", CHAMPION) is None
    move_alias(tmp_path, "pair", CHAMPION, "v1", reason="first")
    move_alias(tmp_path, "pair", CHAMPION, "v2", reason="faster")
    assert alias_target(tmp_path, "pair", CHAMPION) == "v2"
    assert moves(tmp_path) == [(None, "v1"), ("v1", "v2")]
    assert [event["reason"] for event in read_events(tmp_path)] == ["first", "faster"]
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".aside")]


def test_a_move_that_is_done_already_is_not_logged_again(tmp_path: Path) -> None:
    version(tmp_path, "v1")
    for _ in range(3):
        move_alias(tmp_path, "pair", CHAMPION, "v1", reason="again")
    assert moves(tmp_path) == [(None, "v1")]


def test_what_a_killed_move_left_out_is_made_up_for(tmp_path: Path) -> None:
    version(tmp_path, "v1")
    version(tmp_path, "v2")
    move_alias(tmp_path, "pair", CHAMPION, "v1", reason="first")
    alias = tmp_path / "pair" / CHAMPION
    alias.unlink()
    alias.symlink_to("v2")  # moved, killed before the log
    move_alias(tmp_path, "pair", CHAMPION, "v2", reason="faster")
    assert moves(tmp_path) == [(None, "v1"), ("v1", "v2")]


def test_aliases_and_pairs_do_not_mix_in_the_log(tmp_path: Path) -> None:
    version(tmp_path, "v1")
    (tmp_path / "other" / "v1").mkdir(parents=True)
    move_alias(tmp_path, "pair", CHAMPION, "v1", reason="")
    move_alias(tmp_path, "other", CHAMPION, "v1", reason="")
    move_alias(tmp_path, "pair", "challenger", "v1", reason="")
    assert [(e["pair"], e["alias"], e["from"]) for e in read_events(tmp_path)] == [
        ("pair", "champion", None),
        ("other", "champion", None),
        ("pair", "challenger", None),
    ]


def test_an_alias_needs_a_version(tmp_path: Path) -> None:
    version(tmp_path, "v1")
    with pytest.raises(InputError, match=r"no version v7 \[.*pair\]: choose one that is there"):
        move_alias(tmp_path, "pair", CHAMPION, "v7", reason="")
    assert moves(tmp_path) == [] and alias_target(tmp_path, "pair", CHAMPION) is None


def test_rolling_back_makes_the_champion_before_champion_again(tmp_path: Path) -> None:
    for version in ("v1", "v2", "v3"):
        (tmp_path / "pair" / version).mkdir(parents=True)
        move_alias(tmp_path, "pair", CHAMPION, version, reason="better")
    assert roll_back(tmp_path, "pair") == "v2"
    assert alias_target(tmp_path, "pair", CHAMPION) == "v2"
    assert roll_back(tmp_path, "pair") == "v1"
    with pytest.raises(InputError, match="no champion before this one"):
        roll_back(tmp_path, "pair")
    assert [event["to"] for event in read_events(tmp_path)] == ["v1", "v2", "v3", "v2", "v1"]


def test_a_version_rolled_back_from_is_not_rolled_back_to(tmp_path: Path) -> None:
    for version in ("v1", "v2", "v3"):
        (tmp_path / "pair" / version).mkdir(parents=True)
    move_alias(tmp_path, "pair", CHAMPION, "v1", reason="first")
    move_alias(tmp_path, "pair", CHAMPION, "v2", reason="better")
    roll_back(tmp_path, "pair")
    move_alias(tmp_path, "pair", CHAMPION, "v3", reason="better")
    assert roll_back(tmp_path, "pair") == "v1"
