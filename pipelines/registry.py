"""Published pairs on disk: immutable versions, aliases that move in one step, and a log of every move."""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

from inference.errors import InputError
from pipelines.files import fsync_path, write_text, writing

CHAMPION = "champion"
EVENTS_FILE = "events.jsonl"
ROLLED_BACK = "rolled back"
_VERSION = re.compile(r"v(\d+)")


def versions(root: Path, name: str) -> list[Path]:
    """Version folders of a pair, oldest first; aliases and unfinished folders are none."""
    folder = root / name
    found = (
        [p for p in folder.iterdir() if _VERSION.fullmatch(p.name) and not p.is_symlink()] if folder.is_dir() else []
    )
    return sorted(found, key=lambda p: int(p.name[1:]))


def next_version(root: Path, name: str) -> str:
    """Name of the version to publish next: `v1`, `v2`, ..."""
    known = versions(root, name)
    return f"v{int(known[-1].name[1:]) + 1}" if known else "v1"


def alias_target(root: Path, name: str, alias: str) -> str | None:
    """Version an alias points at, or None."""
    link = root / name / alias
    return os.readlink(link) if link.is_symlink() else None


def read_events(root: Path) -> list[dict[str, str | None]]:
    """Every move of an alias, oldest first."""
    file = root / EVENTS_FILE
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


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
    events = read_events(root)
    logged = next((e["to"] for e in reversed(events) if (e["pair"], e["alias"]) == (name, alias)), None)
    with writing(folder):
        if alias_target(root, name, alias) != version:
            aside = folder / f".{alias}.aside"
            aside.unlink(missing_ok=True)
            aside.symlink_to(version)
            os.replace(aside, folder / alias)
            fsync_path(folder)
        if logged != version:
            event = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "pair": name,
                "alias": alias,
                "from": logged,
                "to": version,
                "reason": reason,
            }
            # The whole log anew, by rename: a kill leaves no torn line behind.
            write_text(root / EVENTS_FILE, "".join(json.dumps(e) + "\n" for e in [*events, event]))


def roll_back(root: Path, name: str) -> str:
    """Make the champion before the present one champion again; returns its version. The registry lock is held.

    Twice in a row goes two steps back: what was rolled back from is passed over.

    Raises:
        InputError: there was no champion before, or its folder is gone.
    """
    present = alias_target(root, name, CHAMPION)
    before = _earlier_champions(root, name)
    if present is None or not before:
        raise InputError("no champion before this one", where=str(root / name), mend="publish a pair first: dspark")
    move_alias(root, name, CHAMPION, before[-1], reason=f"{ROLLED_BACK} from {present}")
    return before[-1]


def _earlier_champions(root: Path, name: str) -> list[str]:
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
