"""Published pairs on disk: immutable versions, aliases that move in one step, and a log of every move.

The log also says which versions were imported and removed, and the digest of each version's `files.json`. What is in a
version it does not know.
"""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inference.errors import InputError
from pipelines.files import fsync_path, sha256_file, write_text, writing

CHAMPION = "champion"
EVENTS_FILE = "events.jsonl"
FILES_FILE = "files.json"
"""Digests of all files of a version; see `pipelines.pairs.digests`."""
ROLLED_BACK = "rolled back"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"v(\d+)")


def is_name(name: str) -> bool:
    """Whether a pair may have this name: letters, digits, dots and dashes, and not that of a version."""
    return bool(_NAME.fullmatch(name)) and not _VERSION.fullmatch(name)


def names(root: Path) -> list[str]:
    """Pairs of a registry in alphabetical order; a folder without a version is none."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [folder.name for folder in folders if is_name(folder.name) and versions(root, folder.name)]


def versions(root: Path, name: str) -> list[Path]:
    """Version folders of a pair, oldest first; aliases and unfinished folders are none."""
    folder = root / name
    found = (
        [p for p in folder.iterdir() if _VERSION.fullmatch(p.name) and not p.is_symlink()] if folder.is_dir() else []
    )
    return sorted(found, key=lambda p: int(p.name[1:]))


def next_version(root: Path, name: str) -> str:
    """Name of the version to publish next: `v1`, `v2`, ... A number that the log knows is never given again."""
    logged = [entry.get("to") or entry.get("version") for entry in read_log(root) if entry["pair"] == name]
    known = [*(folder.name for folder in versions(root, name)), *filter(None, logged)]
    return f"v{max((int(version[1:]) for version in known if _VERSION.fullmatch(version)), default=0) + 1}"


def alias_target(root: Path, name: str, alias: str) -> str | None:
    """Version an alias points at, or None."""
    link = root / name / alias
    return os.readlink(link) if link.is_symlink() else None


def aliases(root: Path, name: str) -> dict[str, str]:
    """Every alias of a pair with the version it points at, whether that is there or not."""
    folder = root / name
    links = [p for p in sorted(folder.iterdir()) if p.is_symlink()] if folder.is_dir() else []
    return {link.name: os.readlink(link) for link in links if not link.name.startswith(".")}


def read_log(root: Path) -> list[dict[str, Any]]:
    """Every entry of the log, oldest first: moves of aliases, and versions that were `imported` or `removed`.

    Raises:
        InputError: it cannot be read; the line is named.
    """
    file = root / EVENTS_FILE
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["pair"], str):
                raise TypeError
            entries.append(entry)
        except (ValueError, KeyError, TypeError):
            raise InputError(
                "not an entry of the log", where=f"{file}:{number}", mend="mend the line, or put a copy back"
            ) from None
    return entries


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    except UnicodeDecodeError:
        raise InputError("the log is not UTF-8 text", where=str(file), mend="put a copy back") from None


def read_events(root: Path) -> list[dict[str, Any]]:
    """Every move of an alias, oldest first.

    Raises:
        InputError: the log cannot be read.
    """
    return [entry for entry in read_log(root) if "alias" in entry]


def recorded_digest(log: list[dict[str, Any]], name: str, version: str) -> str | None:
    """Digest of a version's `files.json` as the log first had it; None for one that was never recorded."""
    about = (e for e in log if e["pair"] == name and version in (e.get("to"), e.get("version")))
    return next((str(entry["digest"]) for entry in about if entry.get("digest")), None)


def add_to_log(root: Path, entry: dict[str, Any]) -> None:
    """Append an entry, with the time in front. The registry lock is held.

    Raises:
        InputError: the log cannot be read or written.
    """
    entries = [*read_log(root), {"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry}]
    # The whole log anew, by rename: a kill leaves no torn line behind.
    write_text(root / EVENTS_FILE, "".join(json.dumps(e) + "\n" for e in entries))


def digest_of_version(log: list[dict[str, Any]], folder: Path) -> str | None:
    """What the log says of a version's `files.json`, or what the file is where the log says nothing; None without one.

    What was recorded first stays: a file that changed since is not made right by a later entry.
    """
    known = recorded_digest(log, folder.parent.name, folder.name)
    return known or (sha256_file(folder / FILES_FILE) if (folder / FILES_FILE).is_file() else None)


def move_alias(root: Path, name: str, alias: str, version: str, *, reason: str) -> None:
    """Point an alias at a version in one rename, and append the move to the log. The registry lock is held.

    Does what is missing: nothing when the alias is there and logged, the log entry alone when a run was killed between
    the two.

    Raises:
        InputError: no such version, or the registry cannot be written.
    """
    folder = root / name
    if not (folder / version).is_dir():
        raise InputError(f"no version {version}", where=str(folder), mend="choose one that is there")
    log = read_log(root)
    logged = next((e["to"] for e in reversed(log) if (e["pair"], e.get("alias")) == (name, alias)), None)
    with writing(folder):
        if alias_target(root, name, alias) != version:
            aside = folder / f".{alias}.aside"
            aside.unlink(missing_ok=True)
            aside.symlink_to(version)
            os.replace(aside, folder / alias)
            fsync_path(folder)
        if logged != version:
            entry = {"pair": name, "alias": alias, "from": logged, "to": version, "reason": reason}
            add_to_log(root, {**entry, "digest": digest_of_version(log, folder / version)})


def roll_back(root: Path, name: str) -> str:
    """Make the champion before the present one champion again; returns its version. The registry lock is held.

    Twice in a row goes two steps back: what was rolled back from is passed over.

    Raises:
        InputError: there was no champion before, or its folder is gone.
    """
    present = alias_target(root, name, CHAMPION)
    before = earlier_champions(root, name)
    if present is None or not before:
        raise InputError("no champion before this one", where=str(root / name), mend="publish a pair first: dspark")
    if not (root / name / before[-1]).is_dir():
        raise InputError(
            f"{before[-1]}, the champion before this one, was removed",
            where=str(root / name),
            mend="import or publish a pair to move champion",
        )
    move_alias(root, name, CHAMPION, before[-1], reason=f"{ROLLED_BACK} from {present}")
    return before[-1]


def earlier_champions(root: Path, name: str) -> list[str]:
    """Versions that were champion before the present one, oldest first, without those that were rolled back from."""
    stack: list[str] = []
    for event in read_events(root):
        if (event["pair"], event["alias"]) != (name, CHAMPION) or event["to"] is None:
            continue
        if str(event["reason"]).startswith(ROLLED_BACK) and len(stack) > 1:
            stack.pop()
        else:
            stack.append(event["to"])
    return stack[:-1]
