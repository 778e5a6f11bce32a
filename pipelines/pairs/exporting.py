"""`dspark pairs export`: hand a version on to a store, so that it is whole there or recognisably not.

Every file is checked before it goes. `pair.json` goes last but one and `files.json` last: without them nobody takes the
copy for a pair. A push that was cut short goes on where it stopped.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from inference.errors import InputError
from inference.pair_files import PAIR_FILE, read_pair
from pipelines.files import sha256_bytes
from pipelines.pairs import digests
from pipelines.pairs.checking import version_faults
from pipelines.pairs.digests import Entry
from pipelines.pairs.naming import Version
from pipelines.pairs.retries import retried, shown
from pipelines.pairs.stores import LocalFolder, Store, open_store, read, write
from pipelines.pairs.tables import say, size
from pipelines.progress import tracked
from pipelines.registry import FILES_FILE

logger = logging.getLogger(__name__)

CARD_FILE = "MODEL_CARD.md"


def export(version: Version, where: str, *, private: bool = True) -> None:
    """Copy a version to an address, or find it there already.

    Args:
        version: to copy.
        where: a folder, an fsspec address or `hf://user/repo[@revision]`: of this version and nothing else.
        private: whether a Hub repository that has to be made is private.

    Raises:
        InputError: the version is damaged, another one or something else is at the address, or the store fails.
    """
    if faults := version_faults(version):
        raise faults[0]
    entries = digests.read(version.folder) if digests.is_sealed(version.folder) else digests.take(version.folder)
    seal = digests.to_bytes(entries)
    store = open_store(where, private=private)
    _refuse_registry(store, version.root)
    with tempfile.TemporaryDirectory() as scratch:
        there = retried(store.sizes, where=where)
        if _there_already(store, there, seal, through=Path(scratch)):
            say(f"{version.label} is at {shown(where)} already, nothing to do")
            return
        _refuse_others(store, there, entries)
        if store.at_once:
            _push_at_once(store, version, entries, seal, scratch=Path(scratch))
        else:
            _push(store, version, entries, there)
            write(store, FILES_FILE, seal, through=Path(scratch))
    total = size(sum(entry.bytes for entry in entries.values()))
    say(f"exported {version.label} to {shown(where)}: {len(entries)} files, {total}, seal {sha256_bytes(seal)[:12]}")


def _refuse_registry(store: Store, root: Path | None) -> None:
    """An export is no way to make a version of this registry."""
    if root and isinstance(store, LocalFolder) and store.folder.resolve().is_relative_to(root.resolve()):
        raise InputError("this is inside the registry", where=store.where, mend="choose a folder outside of it")


def _there_already(store: Store, there: Mapping[str, int], seal: bytes, *, through: Path) -> bool:
    """Whether the whole version is there.

    Raises:
        InputError: another version is.
    """
    if FILES_FILE not in there:
        return False
    if read(store, FILES_FILE, through=through) != seal:
        raise InputError(
            "another version is there", where=shown(store.where), mend="choose another address, as in .../v2 or @v2"
        )
    entries = digests.parse(seal, where=FILES_FILE)
    return all(there.get(name) == entry.bytes for name, entry in entries.items())


def _refuse_others(store: Store, there: Mapping[str, int], entries: Mapping[str, Entry]) -> None:
    """Leave a place alone that holds what is no part of the version."""
    others = [name for name in there if name not in entries and name != FILES_FILE and name not in store.own_files]
    if others:
        raise InputError(
            f"other files are there, such as {others[0]}",
            where=shown(store.where),
            mend="choose an empty address for this version",
        )


def _push(store: Store, version: Version, entries: Mapping[str, Entry], there: Mapping[str, int]) -> None:
    """Copy all files but `files.json`, those that are there already left out."""
    store.tidy()
    skipped = 0
    names = sorted(entries, key=lambda name: (name == PAIR_FILE, name))
    for name in tracked(names, "export", unit="files"):
        if there.get(name) == entries[name].bytes and _same(store, name, entries[name]):
            skipped += 1
            continue
        _put(store, name, version.folder / name)
    if skipped:
        logger.info("export: %d of %d files were there already", skipped, len(entries))
    now = retried(store.sizes, where=store.where)
    short = next((name for name, entry in entries.items() if now.get(name) != entry.bytes), None)
    if short is not None:
        raise InputError(
            f"the store holds {now.get(short, 0)} of {entries[short].bytes} bytes of {short}",
            where=shown(store.where),
            mend="run the same command again",
        )


def _same(store: Store, name: str, entry: Entry) -> bool:
    return retried(lambda: store.digest(name), where=store.where) == entry.sha256


def _put(store: Store, name: str, source: Path) -> None:
    retried(lambda: store.put({name: source}), where=store.where)


def _push_at_once(store: Store, version: Version, entries: Mapping[str, Entry], seal: bytes, *, scratch: Path) -> None:
    """Copy everything in the store's one step, with the page it wants."""
    from pipelines.pairs.hub import README_FILE, readme

    card = version.folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {version.label}\n"
    (scratch / README_FILE).write_text(readme(read_pair(version.folder), text, where=store.where), encoding="utf-8")
    (scratch / FILES_FILE).write_bytes(seal)
    files = {name: version.folder / name for name in entries}
    whole = {**files, README_FILE: scratch / README_FILE, FILES_FILE: scratch / FILES_FILE}
    retried(lambda: store.put(whole), where=store.where)
