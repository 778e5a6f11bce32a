"""One writer per registry: a second run is told who holds it and ends at once (exit code 4).

The lock is the kernel's, so a run that was killed holds nothing. The note beside it only says whose it is.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from inference.errors import InputError
from pipelines.files import write_json, writing


class RegistryBusy(InputError):
    """Another run holds the registry; the command line ends with exit code 4."""


def holder(note: Path) -> str:
    """Who holds the lock, in words, from the note its holder left beside it."""
    try:
        who = json.loads(note.read_text(encoding="utf-8"))
        age = datetime.now(UTC) - datetime.fromisoformat(who["since"])
        minutes = int(age.total_seconds() // 60)
        return f"process {who['pid']} on {who['host']} since {who['since']} ({minutes} min)"
    except (OSError, ValueError, KeyError, TypeError):
        return "a run that has only just started"


@contextmanager
def registry_lock(root: Path) -> Iterator[None]:
    """Hold the registry below `root` for the length of the block, without waiting for it.

    Raises:
        RegistryBusy: another run holds it; the message names its process, host and start.
        InputError: the folder cannot be written.
    """
    note = root / ".lock.json"
    lock = FileLock(root / ".lock")
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RegistryBusy(
                f"another run holds the registry: {holder(note)}",
                where=str(root),
                mend="wait until it ends, or choose another folder with paths.registry=...",
            ) from None
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(note, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        with contextlib.suppress(
            OSError
        ):  # a note left behind misleads nobody: only a held lock is ever explained by it
            note.unlink()
        lock.release()
