"""`dspark pairs import`: take a version from a store into this registry, after every byte of it has been checked.

Files are fetched into a folder aside, which a later import of the same version goes on with after a kill. The registry
is locked for the last step alone: the version gets the next free number, and `pair.json` says which that is and where
the version comes from. The champion stays unless it is asked for.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout

from inference.errors import InputError
from inference.pair_files import PAIR_FILE, read_pair
from pipelines.files import fsync_path, fsync_tree, sha256_bytes, sha256_file, write_json, writing
from pipelines.locks import RegistryBusy, registry_lock
from pipelines.pairs import digests
from pipelines.pairs.collection import IMPORT, lock_of
from pipelines.pairs.fetching import Source, fetch_all, look, origins
from pipelines.pairs.retries import shown
from pipelines.pairs.stores import open_store
from pipelines.pairs.tables import say
from pipelines.registry import (
    CHAMPION,
    FILES_FILE,
    add_to_log,
    is_name,
    move_alias,
    next_version,
    read_log,
    recorded_digest,
    versions,
)

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""Seconds that a finished download waits for the registry."""


def bring(where: str, root: Path, *, name: str | None = None, champion: bool = False) -> str:
    """Take a version in, or find it here already; returns its name in this registry, as in `smollm2/v4`.

    Args:
        where: a folder, an fsspec address or `hf://user/repo[@revision]`.
        root: the registry.
        name: of the pair here; None takes the name it has there.
        champion: whether it becomes champion.

    Raises:
        InputError: no whole version is there, it is damaged or not to be trusted, or the store fails.
        RegistryBusy: another run holds the registry; what was fetched stays for the next try.
    """
    if name is not None and not is_name(name):
        raise InputError(f"{name!r} is no name for a pair", where="--as", mend="letters, digits, dots and dashes")
    source = look(open_store(where))
    name = name or str(source.info.get("name"))
    if not is_name(name):
        raise InputError(f"its name {name!r} is none", where=shown(where), mend="give it one with --as NAME")
    known = _found(root / name, source)
    version = known or _obtain(source, root, name)
    say(
        f"{shown(where)} is here already as {name}/{version}"
        if known
        else f"imported {shown(where)} as {name}/{version}"
    )
    if champion or _unlogged(root, name, version):
        with _registry(root):
            _log(source, root, name, version)
            if champion:
                move_alias(root, name, CHAMPION, version, reason=f"imported from {shown(where)}")
                say(f"champion is {name}/{version}")
    return f"{name}/{version}"


def _obtain(source: Source, root: Path, name: str) -> str:
    """Fetch a version and give it its place; returns its number. Two imports of one version end with one of it."""
    folder = root / name
    partial = folder / f"{IMPORT}{source.digest[:16]}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(lock_of(partial)) as lock:
        if version := _found(folder, source):  # by whoever held the lock before
            return version
        fetch_all(source, partial)
        with _registry(root):
            version = _take_in(source, partial, root, name)
            _log(source, root, name, version)
        Path(lock.lock_file).unlink(missing_ok=True)  # whoever waits for it finds the version
        return version


@contextmanager
def _alone(lock: BaseFileLock) -> Iterator[BaseFileLock]:
    """Hold the lock of a version that is being imported; another import of it is waited for."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another import of this version runs, waiting")
        lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def _take_in(source: Source, partial: Path, root: Path, name: str) -> str:
    """Give the fetched version its place in the registry; returns its number. The registry lock is held."""
    version = next_version(root, name)
    write_json(partial / PAIR_FILE, {**source.info, "name": name, "version": version, "imported": _origin(source)})
    digests.seal(partial)
    with writing(partial):
        fsync_tree(partial)
        os.rename(partial, root / name / version)
        fsync_path(root / name)
    return version


def _origin(source: Source) -> dict[str, Any]:
    """What `pair.json` says of where the version comes from."""
    info = source.info
    return {
        "from": shown(source.store.where),
        "name": info.get("name"),
        "version": info.get("version"),
        "digest": source.digest,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "before": info.get("imported"),
    }


def _log(source: Source, root: Path, name: str, version: str) -> None:
    """Say in the log where a version comes from, once. The registry lock is held."""
    if _unlogged(root, name, version):
        digest = sha256_file(root / name / version / FILES_FILE)
        entry = {"pair": name, "event": "imported", "version": version, "digest": digest}
        add_to_log(root, {**entry, "origin": shown(source.store.where), "origin_digest": source.digest})


def _unlogged(root: Path, name: str, version: str) -> bool:
    """Whether a version was imported by a run that was killed before it said so."""
    came = origins(read_pair(root / name / version))
    return bool(came) and recorded_digest(read_log(root), name, version) is None


def _found(folder: Path, source: Source) -> str | None:
    """The version here that is the same as one in a store, whatever number it has."""
    for version in versions(folder.parent, folder.name):
        try:
            if source.same_as & {_seal_of(version), *origins(read_pair(version))}:
                return version.name
        except InputError as error:
            logger.warning("passed over: %s", error)
    return None


def _seal_of(folder: Path) -> str:
    """Digest of a version's `files.json`, or of the one it would have; only the latter reads all its files."""
    if digests.is_sealed(folder):
        return sha256_file(folder / FILES_FILE)
    return sha256_bytes(digests.to_bytes(digests.take(folder)))


@contextmanager
def _registry(root: Path) -> Iterator[None]:
    """Hold the registry; another import's last step takes moments, so it is waited for a little.

    Raises:
        RegistryBusy: it is held for longer.
    """
    give_up = time.monotonic() + PATIENCE_S
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(registry_lock(root))
                break
            except RegistryBusy:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)
        yield
