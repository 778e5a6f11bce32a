"""A seal finds every change of every file, itself included, and trusts no stranger's names."""

import json
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.files import sha256_file
from pipelines.pairs.digests import Entry, check, files_of, parse, read, seal, take, to_bytes
from pipelines.registry import FILES_FILE
from tests.pipelines.pairs import fake


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return fake.write(tmp_path / "v1", "pair", "v1")


def entry(name: str) -> bytes:
    return json.dumps({name: {"bytes": 1, "sha256": "0" * 64}}).encode()


def test_a_seal_names_every_file_and_returns_its_own_digest(version: Path) -> None:
    digest = seal(version)
    assert digest == sha256_file(version / FILES_FILE)
    found = json.loads((version / FILES_FILE).read_text())
    assert list(found) == sorted(found) == files_of(version)
    assert set(found) == {p.relative_to(version).as_posix() for p in version.rglob("*") if p.is_file()} - {FILES_FILE}
    assert found[fake.WEIGHTS] == {
        "bytes": (version / fake.WEIGHTS).stat().st_size,
        "sha256": sha256_file(version / fake.WEIGHTS),
    }
    assert check(version, recorded=digest) == [] == check(version)


def test_sealing_again_gives_the_same_digest(version: Path) -> None:
    assert seal(version) == seal(version)


def test_a_flipped_bit_is_found_in_each_file_in_turn(version: Path) -> None:
    digest = seal(version)
    for name in [*files_of(version), FILES_FILE]:
        whole = (version / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            (version / name).write_bytes(flipped)
            faults = check(version, recorded=digest)
            assert faults and any(fault.startswith(f"{name}: ") for fault in faults), (name, place)
        (version / name).write_bytes(whole)
    assert check(version, recorded=digest) == []


def test_a_seal_forged_with_the_file_is_found_by_the_recorded_digest(version: Path) -> None:
    digest = seal(version)
    (version / fake.WEIGHTS).write_bytes(b"other weights")
    seal(version)
    assert check(version) == []  # consistent in itself
    assert check(version, recorded=digest) == ["files.json: not the one that was recorded when the version was made"]


def test_missing_added_and_cut_files_are_told_apart(version: Path) -> None:
    digest = seal(version)
    (version / "draft" / "config.json").unlink()
    (version / "notes.txt").write_text("mine", encoding="utf-8")
    (version / "MODEL_CARD.md").write_text("#", encoding="utf-8")
    assert check(version, recorded=digest) == [
        "MODEL_CARD.md: has 1 bytes, not 19",
        "draft/config.json: is missing",
        "notes.txt: was added",
    ]


def test_a_seal_that_is_gone_is_missed_where_it_was_recorded(version: Path) -> None:
    digest = seal(version)
    (version / FILES_FILE).unlink()
    assert check(version, recorded=digest) == ["files.json: cannot read it (No such file or directory)"]


def test_a_version_older_than_seals_is_checked_by_its_draft(version: Path) -> None:
    assert check(version) == []
    (version / fake.WEIGHTS).write_bytes(b"x")
    assert check(version) == ["draft/model.safetensors: was changed"]


def test_links_are_refused(version: Path) -> None:
    (version / "draft" / "link").symlink_to("config.json")
    with pytest.raises(InputError, match=r"symbolic link in a version \[.*link\]"):
        seal(version)
    (version / "draft" / "link").unlink()
    digest = seal(version)
    (version / "elsewhere").symlink_to("/")
    assert check(version, recorded=digest) == ["elsewhere: a symbolic link in a version"]


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "", ".", "a/", "a\\b", "C:x", "a\nb", "a\0b", "x" * 241],
)
def test_a_name_that_leads_anywhere_else_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"files.json names .*which"):
        parse(entry(name), where="there")


def test_a_name_that_takes_the_place_of_another_is_refused() -> None:
    one = {"bytes": 1, "sha256": "0" * 64}
    with pytest.raises(InputError, match="another file's place"):
        parse(json.dumps({"a": one, "a/b": one}).encode(), where="there")
    with pytest.raises(InputError, match="another file's place"):
        parse(entry(FILES_FILE), where="there")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {"bytes": 1}}',
        b'{"a": {"bytes": -1, "sha256": "' + b"0" * 64 + b'"}}',
        b'{"a": {"bytes": true, "sha256": "' + b"0" * 64 + b'"}}',
        b'{"a": {"bytes": 1, "sha256": "xyz"}}',
        b'{"a": {"bytes": 1, "sha256": "' + b"0" * 64 + b'", "more": 1}}',
    ],
)
def test_what_is_no_seal_is_said_to_be_damaged(content: bytes) -> None:
    with pytest.raises(InputError, match=r"files.json is damaged \[there\]"):
        parse(content, where="there")


def test_names_and_digests_survive_the_file(version: Path) -> None:
    (version / 'n\u00e4m\u00e9 with "quotes".txt').write_text("x", encoding="utf-8")
    seal(version)
    assert read(version) == take(version) == parse(to_bytes(take(version)), where="")
    assert all(isinstance(one, Entry) for one in read(version).values())
