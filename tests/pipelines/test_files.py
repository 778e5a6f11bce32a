"""Files are whole or absent, and a disk that refuses is told in one line."""

import errno
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines import files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on which 64 KiB cannot be written: a tmpfs where mounting is allowed, else the process's own limit."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, hard))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_the_old_file(small_disk: Path) -> None:
    path = small_disk / "records.json"
    files.write_text(path, "old")
    with pytest.raises(InputError, match=r"no space left on the disk|larger than allowed") as caught:
        files.write_text(path, "x" * 2**18)
    assert str(path) in str(caught.value) or path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert [entry.name for entry in small_disk.iterdir()] == ["records.json"]


def test_safetensors_on_a_full_disk_is_the_same_line(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = small_disk / "model.safetensors"
    with pytest.raises(InputError, match=r"no space left on the disk|larger than allowed"):
        with files.replacing(path) as aside:
            save_file({"weight": torch.zeros(2**18)}, aside)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "read only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
    ],
)
def test_what_the_user_can_mend_is_translated(number: int, said: str) -> None:
    with pytest.raises(InputError, match=rf"{said}.*\[/there\].*:"), files.writing("/there"):
        raise OSError(number, os.strerror(number))


def test_the_error_names_the_file_it_knows() -> None:
    with pytest.raises(InputError, match=r"\[/deep/file\]"), files.writing("/there"):
        raise OSError(errno.ENOSPC, "full", "/deep/file")


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(FileNotFoundError, match="gone"), files.writing("/there"):
        raise FileNotFoundError(errno.ENOENT, "gone")
    with pytest.raises(ValueError, match="not ours"), files.writing("/there"):
        raise ValueError("not ours")


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="halfway"), files.replacing(tmp_path / "a") as aside:
        aside.write_text("half")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_made(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("")
    with pytest.raises(InputError, match="a file stands where a folder is needed"):
        files.write_text(tmp_path / "artifacts" / "x.json", "")


class Colour(Enum):
    RED = "red"


@dataclass
class Nested:
    path: Path
    pair: tuple[int, float]
    colour: Colour


def test_plain_turns_typed_objects_into_json() -> None:
    value = {"n": Nested(Path("a/b"), (1, 0.5), Colour.RED), "s": {3, 1}, "inf": float("inf"), "nan": float("nan")}
    expected = {"n": {"path": "a/b", "pair": [1, 0.5], "colour": "red"}, "s": [1, 3], "inf": "Infinity", "nan": "NaN"}
    assert files.plain(value) == expected
    assert float(expected["inf"]) == float("inf")  # type: ignore[arg-type]


def test_plain_refuses_what_json_has_no_place_for() -> None:
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        files.plain({"x": object()})


def test_canonical_json_does_not_depend_on_order() -> None:
    assert files.canonical_json({"b": 1, "a": [True, None]}) == b'{"a":[true,null],"b":1}'
    assert files.canonical_json({"a": [True, None], "b": 1}) == b'{"a":[true,null],"b":1}'


def test_json_comes_back(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"a": [1, 2.5, "\u00e9"]})
    assert files.read_json(tmp_path / "x.json") == {"a": [1, 2.5, "\u00e9"]}


def test_malformed_json_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{\n"a": 1,\n}\n')
    with pytest.raises(InputError, match=r"not valid JSON.*x\.json:[23]"):
        files.read_json(tmp_path / "x.json")


def test_a_missing_json_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the file \(No such file.*none\.json"):
        files.read_json(tmp_path / "none.json")


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "abc") == files.sha256_bytes(b"abc") == expected


def test_several_files_are_hashed_side_by_side_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    together = threading.Barrier(3, timeout=20)  # which no thread passes before three are there

    def work(number: int) -> int:
        together.wait()
        time.sleep(0.02 * (3 - number % 3))  # later ones are done first
        return 10 * number

    assert files.side_by_side(work, range(6)) == [0, 10, 20, 30, 40, 50]
    assert files.side_by_side(str, []) == []
    # A single one, and one processor, need no thread.
    here = threading.get_ident()
    assert files.side_by_side(lambda _: threading.get_ident(), [0]) == [here]
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert files.side_by_side(lambda _: threading.get_ident(), [0, 1]) == [here, here]


def test_of_several_failures_the_first_in_order_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    def work(name: str) -> None:
        if name == "b":
            time.sleep(0.05)  # the later failure comes first
        if name in "bc":
            raise InputError("damaged", where=name)

    with pytest.raises(InputError, match=r"damaged \[b\]"):
        files.side_by_side(work, ["a", "b", "c", "d"])


def test_the_digest_of_a_folder_is_made_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b", "deep/a"):
        (tmp_path / name).write_text(name)
    by_name = {name: files.sha256_bytes(name.encode()) for name in ("b", "deep/a")}
    assert files.content_digest(tmp_path) == files.sha256_bytes(files.canonical_json(by_name))
    assert files.content_digest(tmp_path / "none") is None
