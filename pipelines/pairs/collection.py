"""`dspark pairs gc`: remove old versions and what killed runs left, never what is in use or a rollback needs.

A version goes in three steps: renamed aside, logged, deleted. A kill between them leaves what the next gc ends.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from inference.errors import InputError
from pipelines.files import fsync_path, writing
from pipelines.locks import registry_lock
from pipelines.pairs.listing import bytes_of
from pipelines.pairs.naming import check_known
from pipelines.pairs.tables import say, size
from pipelines.realign.cycle import open_cycle
from pipelines.registry import (
    CHAMPION,
    add_to_log,
    aliases,
    earlier_champions,
    is_name,
    read_log,
    recorded_digest,
    versions,
)

PARTIAL, REMOVED, ASIDE = ".partial-", ".removed-", ".aside"
IMPORT = f"{PARTIAL}import-"


@dataclass(frozen=True)
class Plan:
    """What a collection would do to a pair.

    Attributes:
        remove: version folders to remove, oldest first.
        kept: reason by version that stays although it is old.
        leftovers: folders and files of killed runs.
    """

    remove: list[Path]
    kept: dict[str, str]
    leftovers: list[Path]


def collect(root: Path, name: str, *, keep: int, dry_run: bool) -> None:
    """Remove all but the newest versions of a pair and those that are needed; say which and how many bytes.

    Args:
        root: the registry.
        name: of the pair.
        keep: newest versions that stay, at least 1.
        dry_run: only say it.

    Raises:
        InputError: no such pair, or fewer than one version to keep.
        RegistryBusy: another run holds the registry.
    """
    if keep < 1:
        raise InputError(f"--keep is {keep}", where="dspark pairs gc", mend="keep at least 1 version")
    if not is_name(name) or not (root / name).is_dir():  # one of which nothing but a killed import is left will do
        check_known(root, name)
    with registry_lock(root):
        plan = plan_for(root, name, keep=keep)
        for version, why in plan.kept.items():
            say(f"kept {name}/{version}: {why}")
        total = 0
        for path in [*plan.leftovers, *plan.remove]:
            taken = bytes_of(path)
            total += taken
            say(f"{'would remove' if dry_run else 'removed'} {path.relative_to(root)}: {size(taken)}")
            if not dry_run:
                _remove(root, path, taken, why=f"gc --keep {keep}")
        say(f"{size(total)} {'would be freed' if dry_run else 'freed'}")


def plan_for(root: Path, name: str, *, keep: int) -> Plan:
    """What may go and what stays. The registry lock is held, so that no run is publishing."""
    found = versions(root, name)
    old = found[:-keep]
    needed = _needed(root, name)
    kept = {folder.name: needed[folder.name] for folder in old if folder.name in needed}
    leftovers = [path for path in sorted((root / name).iterdir()) if _left_over(path)]
    return Plan([folder for folder in old if folder.name not in needed], kept, leftovers)


def _needed(root: Path, name: str) -> dict[str, str]:
    """Versions that something leads to, with what it is."""
    needed = {version: alias for alias, version in aliases(root, name).items()}
    before = earlier_champions(root, name)
    if before:
        needed.setdefault(before[-1], f"the {CHAMPION} to roll back to")
    cycle = open_cycle(root / name)
    if cycle is not None:
        needed.setdefault(cycle.champion, f"re-alignment {cycle.id} is under way on it")
    return needed


def _left_over(path: Path) -> bool:
    """Whether a killed run left it."""
    if path.name.startswith(PARTIAL):
        with unused(path) as free:
            return free
    return path.name.startswith(REMOVED) or (path.name.startswith(".") and path.name.endswith(ASIDE))


def lock_of(partial: Path) -> FileLock:
    """The lock that an import holds while it fills a partial folder."""
    return FileLock(partial.with_name(f".lock-{partial.name.removeprefix(PARTIAL)}"))


@contextmanager
def unused(partial: Path) -> Iterator[bool]:
    """Keep everybody from a partial folder for the length of a block; yields False where somebody is at it.

    Imports hold a lock of their own. All others hold the registry's, as the caller does: they cannot be running.
    """
    lock = lock_of(partial)
    if partial.name.startswith(IMPORT):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
    try:
        yield True
    finally:
        lock.release()


def _remove(root: Path, path: Path, taken: int, *, why: str) -> None:
    """Remove a version or a leftover; what becomes of a version is in the log before a byte of it is deleted."""
    with writing(path):
        if path.name.startswith(PARTIAL):
            with unused(path) as free:
                if free:
                    shutil.rmtree(path)
        elif path.name.startswith(REMOVED):
            _delete(root, path, taken, why=why)
        elif path.name.startswith("."):
            path.unlink()
        else:
            aside = path.with_name(f"{REMOVED}{path.name}")
            os.rename(path, aside)
            fsync_path(path.parent)
            _delete(root, aside, taken, why=why)


def _delete(root: Path, aside: Path, taken: int, *, why: str) -> None:
    """Log a version that was renamed aside as removed, once, and delete it."""
    name, version = aside.parent.name, aside.name.removeprefix(REMOVED)
    log = read_log(root)
    if not any((e["pair"], e.get("event"), e.get("version")) == (name, "removed", version) for e in log):
        entry = {"pair": name, "event": "removed", "version": version, "bytes": taken, "reason": why}
        add_to_log(root, {**entry, "digest": recorded_digest(log, name, version)})
    shutil.rmtree(aside)
