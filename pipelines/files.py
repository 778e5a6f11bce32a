"""Files that are whole or absent: written aside, fsynced, renamed; and what goes wrong on a disk said in one line.

Everything a stage writes goes through here. It knows nothing of artifacts or of what the files mean.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from inference.errors import InputError

MENDS = {
    errno.ENOSPC: ("no space left on the disk", "free some space or point paths.* at another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or point paths.* at another disk"),
    errno.EFBIG: ("the file would be larger than allowed", "raise the file size limit (ulimit -f)"),
    errno.EROFS: ("the file system is read only", "point paths.* at a folder that can be written"),
    errno.EACCES: ("permission denied", "point paths.* at a folder that can be written"),
    errno.EPERM: ("the operation is not permitted", "point paths.* at a folder that can be written"),
    errno.EEXIST: ("a file stands where a folder is needed", "move it away or choose another folder"),
    errno.ENOTDIR: ("a file stands where a folder is needed", "move it away or choose another folder"),
}
"""What the user is told for each errno that is theirs to mend."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_AT_ONCE = 8
_ERRNO_IN_TEXT = re.compile(r"\((?:os error) (\d+)\)|\[Errno (\d+)\]")


def write_error(error: BaseException, *, where: str | Path = "") -> InputError | None:
    """Translate a failed write into the user's words.

    Libraries in other languages (safetensors, arrow) raise their own types and only quote the number in the text: that
    counts too.

    Args:
        error: what was raised while writing.
        where: file or folder concerned, when the error does not name it.

    Returns:
        The error to raise instead, or None when it is not the user's to mend.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _ERRNO_IN_TEXT.search(str(error))):
        number = int(found[1] or found[2])
    if number not in MENDS:
        return None
    named = error.filename if isinstance(error, OSError) else None
    what, mend = MENDS[number]
    return InputError(what, where=str(named or where), mend=mend)


@contextmanager
def writing(where: str | Path) -> Iterator[None]:
    """Run a block that writes under `where`.

    Raises:
        InputError: the disk is full or read only, or permission is missing; anything else passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        known = write_error(error, where=where)
        if known is None:
            raise
        raise known from error


def fsync_path(path: Path) -> None:
    """Flush one file or folder to the disk, so that a rename after it cannot outlive it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            fsync_path(path)
    fsync_path(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; on a clean exit it is fsynced and becomes `path` in one rename.

    Yields:
        The file to write. When the block raises it is removed, and an older `path` stays as it was.

    Raises:
        InputError: the disk is full or read only, or permission is missing.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            fsync_path(aside)
            os.replace(aside, path)
            fsync_path(path.parent)
        except BaseException:
            if aside.exists():
                aside.unlink()
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def plain(value: Any) -> Any:
    """Turn dataclasses, paths, enums, tuples and sets into what JSON holds.

    Numbers that JSON cannot hold become the words "NaN", "Infinity", "-Infinity", which `float()` reads back.

    Raises:
        TypeError: a value of a kind JSON has no place for.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def canonical_json(value: Any) -> bytes:
    """JSON with one spelling for one value: keys sorted, no spaces, ASCII. What digests are taken of."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON whole or not at all; see `plain` for what it may hold."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it is missing or cannot be read, or is not JSON (with the line).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON ({error.msg})", where=f"{path}:{error.lineno}", mend="mend or remove the file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read the file ({reason})", where=str(path), mend="check the path") from error


def sha256_bytes(content: bytes) -> str:
    """Hex SHA-256 of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What some work on files gives, several of them at a time: hashing and reading let other threads run.

    Returns:
        One result an item, in their order. Of several items that raise, the first one's exception is raised.
    """
    threads = min(_MOST_AT_ONCE, os.cpu_count() or 1, len(items))
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="files") as pool:
        return list(pool.map(work, items))


def content_digest(path: Path) -> str | None:
    """Hex SHA-256 of a file, or of the names and contents of all files below a folder; None when there is neither.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if path.is_file():
            return sha256_file(path)
        if not path.is_dir():
            return None
        files = sorted(p for p in path.rglob("*") if p.is_file())
        digests = side_by_side(sha256_file, files)
        names = [file.relative_to(path).as_posix() for file in files]
        return sha256_bytes(canonical_json(dict(zip(names, digests, strict=True))))
    except OSError as error:
        raise InputError(f"cannot read it ({error.strerror})", where=str(path), mend="check the path") from error
