"""What a store holds under the name of a pair, and bringing it here file by file; not what becomes of it here.

Nothing that a stranger wrote is believed: names may not lead out of the folder, and every file is what the listing
says or is refused.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.errors import InputError
from inference.pair_files import PAIR_FILE, read_pair
from pipelines.files import fsync_tree, sha256_bytes, writing
from pipelines.pairs import digests
from pipelines.pairs.digests import Entry
from pipelines.pairs.retries import TRIES, retried, shown
from pipelines.pairs.stores import Store, read
from pipelines.pairs.tables import size
from pipelines.progress import tracked
from pipelines.registry import FILES_FILE

logger = logging.getLogger(__name__)

LARGEST_SEAL = 2**24
"""Bytes of a stranger's `files.json` that are read at all."""
AGAIN = "export it again from where it was made"


@dataclass(frozen=True)
class Source:
    """A version in a store.

    Attributes:
        store: where it is.
        entries: its files.
        digest: SHA-256 of its `files.json`.
        info: its `pair.json`.
    """

    store: Store
    entries: dict[str, Entry]
    digest: str
    info: dict[str, Any]

    @property
    def same_as(self) -> set[str]:
        """Digests of this version here and wherever it was before."""
        return {self.digest, *origins(self.info)}


def origins(info: Mapping[str, Any]) -> set[str]:
    """Digests that a version had in the registries it came through."""
    found: set[str] = set()
    came = info.get("imported")
    while isinstance(came, dict):
        found.add(str(came.get("digest")))
        came = came.get("before")
    return found


def look(store: Store) -> Source:
    """Read what is there, before anything is fetched for good.

    Raises:
        InputError: no whole version is there.
    """
    where = shown(store.where)
    there = retried(store.sizes, where=store.where)
    if FILES_FILE not in there:
        what, mend = "no pair is there", "check the address, and that you may see it"
        if there:
            what, mend = f"no whole pair is there ({FILES_FILE} is missing)", "run its export again: it was cut short"
        raise InputError(what, where=where, mend=mend)
    if there[FILES_FILE] > LARGEST_SEAL:
        raise InputError(f"{FILES_FILE} has {there[FILES_FILE]} bytes", where=where, mend="do not trust this copy")
    with tempfile.TemporaryDirectory() as scratch:
        seal = read(store, FILES_FILE, through=Path(scratch))
        entries = digests.parse(seal, where=f"{where}/{FILES_FILE}")
        for name, entry in entries.items():
            if there.get(name) != entry.bytes:
                found = "is missing" if name not in there else f"has {there[name]} of {entry.bytes} bytes"
                raise InputError(f"{name} {found}", where=where, mend=AGAIN)
        if PAIR_FILE not in entries:
            raise InputError(f"it has no {PAIR_FILE}", where=where, mend="name the folder of a version")
        _fetch(store, PAIR_FILE, entries[PAIR_FILE], Path(scratch))
        return Source(store, entries, sha256_bytes(seal), read_pair(Path(scratch)))


def fetch_all(source: Source, partial: Path) -> None:
    """Fetch every file that is not there yet, each checked as it comes; nothing else stays in the folder."""
    with writing(partial):
        partial.mkdir(exist_ok=True)
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_symlink() or path.is_file():
                if path.is_symlink() or path.relative_to(partial).as_posix() not in source.entries:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
    missing = [name for name, entry in source.entries.items() if not _has(partial, name, entry)]
    if len(missing) < len(source.entries):
        logger.info("import: %d files were fetched before", len(source.entries) - len(missing))
    need, free = sum(source.entries[name].bytes for name in missing), shutil.disk_usage(partial).free
    if need > free:
        raise InputError(f"it takes {size(need)}, {size(free)} are free", where=str(partial), mend="free some space")
    for name in tracked(missing, "import", unit="files"):
        _fetch(source.store, name, source.entries[name], partial)
    fsync_tree(partial)


def _has(folder: Path, name: str, entry: Entry) -> bool:
    return (folder / name).is_file() and Entry.of(folder / name) == entry


def _fetch(store: Store, name: str, entry: Entry, folder: Path) -> None:
    """Fetch one file and check it.

    Raises:
        InputError: it is not the file that was sealed.
    """
    for _ in range(TRIES):  # what was cut short on its way comes whole the next time
        retried(lambda: store.fetch(name, folder / name), where=store.where)
        if _has(folder, name, entry):
            return
    (folder / name).unlink()
    raise InputError(f"{name} is damaged there", where=shown(store.where), mend=AGAIN)
