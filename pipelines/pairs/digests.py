"""The seal of a version: `files.json` with size and SHA-256 of every other file in it.

    digest = seal(folder)        # written last, when the version is complete
    faults = check(folder, recorded=digest)

The digest of `files.json` itself belongs where the version is not: in the registry's log. A version that was published
before there were seals has none; of it only the draft's files can be checked, by `pair.json`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from inference.errors import InputError
from inference.pair_files import read_pair
from pipelines.files import sha256_bytes, sha256_file, write_bytes
from pipelines.registry import FILES_FILE

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_PART = 240
"""Bytes a file's name may have, so that there is room for the affixes of a file that is being written."""


@dataclass(frozen=True)
class Entry:
    """A file of a version.

    Attributes:
        bytes: its size.
        sha256: hex digest of its content.
    """

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> "Entry":
        """Size and digest of a file on disk."""
        return cls(file.stat().st_size, sha256_file(file))


def files_of(folder: Path) -> list[str]:
    """Relative paths of all files of a version but its `files.json`, sorted.

    Raises:
        InputError: something in it is a link: what it leads to could change or be missing elsewhere.
    """
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise InputError("a symbolic link in a version", where=str(path), mend="put the file itself there")
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name != FILES_FILE:
            found.append(name)
    return sorted(found)


def take(folder: Path) -> dict[str, Entry]:
    """Size and digest of every file of a version as it is now, by relative path, sorted."""
    return {name: Entry.of(folder / name) for name in files_of(folder)}


def to_bytes(entries: Mapping[str, Entry]) -> bytes:
    """What `files.json` says, one file a line."""
    rows = [f"{json.dumps(name)}: {json.dumps(vars(entry))}" for name, entry in sorted(entries.items())]
    return ("{\n  " + ",\n  ".join(rows) + "\n}\n").encode("ascii")


def parse(content: bytes, *, where: str) -> dict[str, Entry]:
    """Read a `files.json`, which may be a stranger's.

    Raises:
        InputError: it is not one, or names a place outside the folder.
    """
    broken = InputError(f"{FILES_FILE} is damaged", where=where, mend="put back a copy of the version")
    try:
        found = json.loads(content)
        entries = {name: Entry(**row) for name, row in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise broken from None
    for entry in entries.values():
        if type(entry.bytes) is not int or entry.bytes < 0 or not _is_sha256(entry.sha256):
            raise broken
    for name in entries:
        if fault := unsafe(name, entries):
            raise InputError(f"{FILES_FILE} names {name!r}, {fault}", where=where, mend="do not trust this copy")
    return entries


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def unsafe(name: str, others: Mapping[str, Any]) -> str:
    """Why a file of this name must not be written below a folder; empty when it may."""
    parts = name.split("/")
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return "which leads out of the folder"
    if "\\" in name or ":" in name or not name.isprintable():
        return "which has characters that are no part of a file's name"
    if any(len(part.encode("utf-8", "surrogatepass")) > _LONGEST_PART for part in parts):
        return "which is too long"
    if name == FILES_FILE or any(str(parent) in others for parent in PurePosixPath(name).parents):
        return "which is another file's place"
    return ""


def seal(folder: Path) -> str:
    """Write `files.json` over a version that is otherwise complete; returns the SHA-256 of that file.

    Raises:
        InputError: a symbolic link is in it, or it cannot be written.
    """
    content = to_bytes(take(folder))
    write_bytes(folder / FILES_FILE, content)
    return sha256_bytes(content)


def is_sealed(folder: Path) -> bool:
    """Whether a version has a `files.json`; those published before there were seals have none."""
    return (folder / FILES_FILE).exists()


def read(folder: Path) -> dict[str, Entry]:
    """What a version's `files.json` says.

    Raises:
        InputError: it is missing or damaged.
    """
    path = folder / FILES_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read it ({error.strerror})", where=str(path), mend="put a copy back") from error
    return parse(content, where=str(path))


def check(folder: Path, *, recorded: str | None = None) -> list[str]:
    """Every fault of a version's files, one line each; none when all are as they were sealed.

    Args:
        folder: of the version.
        recorded: digest of its `files.json` from the registry's log; None where it was never recorded.

    Raises:
        InputError: there is no seal, and no `pair.json` that could stand in for it.
    """
    if not is_sealed(folder) and recorded is None:
        return list(_differences(folder / "draft", _of_draft(folder), prefix="draft/"))
    faults = []
    if is_sealed(folder) and recorded not in (None, sha256_file(folder / FILES_FILE)):
        faults.append(f"{FILES_FILE}: not the one that was recorded when the version was made")
    try:
        entries = read(folder)
        faults += _differences(folder, entries)
        faults += [f"{name}: was added" for name in files_of(folder) if name not in entries]
    except InputError as error:
        faults.append(f"{_relative(error.where, folder)}: {error.what}")
    return faults


def _differences(folder: Path, entries: Mapping[str, Entry | str], *, prefix: str = "") -> Iterator[str]:
    """What of these files is missing, changed or cut short; an entry may be a digest alone."""
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            yield f"{prefix}{name}: is missing"
        elif isinstance(entry, Entry) and file.stat().st_size != entry.bytes:
            yield f"{prefix}{name}: has {file.stat().st_size} bytes, not {entry.bytes}"
        elif sha256_file(file) != (entry.sha256 if isinstance(entry, Entry) else entry):
            yield f"{prefix}{name}: was changed"


def _of_draft(folder: Path) -> dict[str, str]:
    """Digests that `pair.json` keeps of the draft's files."""
    return dict(read_pair(folder)["draft"].get("files", {}))


def _relative(where: str, folder: Path) -> str:
    path = Path(where)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else where
