"""The registry's log records seals, never reuses a number, and says which line of it is broken."""

from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.files import sha256_file
from pipelines.registry import (
    CHAMPION,
    EVENTS_FILE,
    FILES_FILE,
    add_to_log,
    aliases,
    is_name,
    move_alias,
    names,
    next_version,
    read_events,
    read_log,
    recorded_digest,
)
from tests.pipelines.pairs import fake


def test_a_move_records_the_seal_of_the_version(tmp_path: Path) -> None:
    folder = fake.publish(tmp_path)
    [event] = read_log(tmp_path)
    assert event["digest"] == sha256_file(folder / FILES_FILE) == recorded_digest([event], "pair", "v1")
    fake.publish(tmp_path, "old", sealed=False)
    assert read_log(tmp_path)[1]["digest"] is None and recorded_digest(read_log(tmp_path), "old", "v1") is None


def test_a_later_move_repeats_the_first_digest(tmp_path: Path) -> None:
    first = fake.publish(tmp_path)
    fake.publish(tmp_path)
    digest = sha256_file(first / FILES_FILE)
    (first / FILES_FILE).write_text("{}", encoding="utf-8")
    move_alias(tmp_path, "pair", CHAMPION, "v1", reason="by hand")
    assert read_log(tmp_path)[-1]["digest"] == digest


def test_moves_are_told_from_other_entries(tmp_path: Path) -> None:
    fake.publish(tmp_path)
    add_to_log(tmp_path, {"pair": "pair", "event": "imported", "version": "v4", "digest": "d"})
    assert [e["to"] for e in read_events(tmp_path)] == ["v1"] and len(read_log(tmp_path)) == 2
    assert next_version(tmp_path, "pair") == "v5" and next_version(tmp_path, "other") == "v1"
    move_alias(tmp_path, "pair", CHAMPION, "v1", reason="is there already")
    assert len(read_log(tmp_path)) == 2


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"pair": 1}', "\\xff"])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    fake.publish(tmp_path)
    with (tmp_path / EVENTS_FILE).open("a", encoding="utf-8") as log:
        log.write(line + "\n")
    with pytest.raises(InputError, match=r"not an entry of the log \[.*events\.jsonl:2\]"):
        read_events(tmp_path)
    (tmp_path / EVENTS_FILE).write_bytes(b"\xff")
    with pytest.raises(InputError, match="the log is not UTF-8"):
        add_to_log(tmp_path, {"pair": "pair"})


def test_pairs_and_aliases_are_found(tmp_path: Path) -> None:
    assert names(tmp_path / "none") == [] and aliases(tmp_path, "none") == {}
    fake.publish(tmp_path, "b")
    fake.publish(tmp_path, "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / ".champion.aside").symlink_to("v1")
    (tmp_path / "a" / "challenger").symlink_to("v9")
    assert names(tmp_path) == ["a", "b"]
    assert aliases(tmp_path, "a") == {"champion": "v1", "challenger": "v9"}


@pytest.mark.parametrize(
    ("name", "allowed"), [("a", True), ("a.b-C_1", True), ("v1", False), ("-a", False), ("", False)]
)
def test_a_name_is_not_that_of_a_version(name: str, allowed: bool) -> None:
    assert is_name(name) is allowed
