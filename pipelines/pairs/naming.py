"""Which version a word names: `smollm2`, `smollm2/v3`, `smollm2/champion`, or a folder with a pair in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.errors import InputError
from inference.pair_files import PAIR_FILE
from pipelines.composition import nearest
from pipelines.registry import CHAMPION, EVENTS_FILE, alias_target, aliases, is_name, names, read_log, versions


@dataclass(frozen=True)
class Version:
    """A version of a pair.

    Attributes:
        folder: its files.
        name: of the pair; the folder's own for one outside a registry.
        version: `v3`; empty outside a registry.
        root: the registry; None outside one.
    """

    folder: Path
    name: str
    version: str
    root: Path | None

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.name}/{self.version}" if self.root else str(self.folder)

    @property
    def aliases(self) -> list[str]:
        """Aliases that point at it."""
        found = aliases(self.root, self.name) if self.root else {}
        return [alias for alias, version in found.items() if version == self.version]

    def log(self) -> list[dict[str, Any]]:
        """The registry's log; nothing outside one."""
        return read_log(self.root) if self.root else []


def all_versions(root: Path, name: str) -> list[Version]:
    """Versions of a pair, oldest first.

    Raises:
        InputError: there is no such pair.
    """
    check_known(root, name)
    return [Version(folder, name, folder.name, root) for folder in versions(root, name)]


def check_known(root: Path, name: str) -> None:
    """Refuse a pair that is not there.

    Raises:
        InputError: with the nearest names there are.
    """
    if not is_name(name):
        raise InputError(f"{name!r} is no name of a pair", mend="letters, digits, dots and dashes, not a version")
    known = names(root)
    if name not in known:
        hint = nearest(name, known) or (f"there are {', '.join(known)}" if known else "it holds no pair yet")
        raise InputError(f"no pair {name!r}", where=str(root), mend=hint)


def find(root: Path, word: str) -> Version:
    """The version that a word names; a pair's name alone is its champion, or its newest version without one.

    Args:
        root: the registry.
        word: `NAME`, `NAME/VERSION`, `NAME/ALIAS` or a folder.

    Raises:
        InputError: no such pair or version, with the nearest names there are.
    """
    name, _, version = word.rstrip("/").partition("/")
    if not (is_name(name) and (root / name).is_dir()) and (Path(word).expanduser() / PAIR_FILE).exists():
        return _of_folder(Path(word).expanduser())
    check_known(root, name)
    known = [folder.name for folder in versions(root, name)]
    there = aliases(root, name)
    chosen = there.get(version, version) if version else (alias_target(root, name, CHAMPION) or known[-1])
    if chosen not in known:
        alias = version or CHAMPION
        what = f"{alias} is {chosen}, which is not there" if alias in there else f"no version {version!r}"
        hint = nearest(version, [*known, *there]) or f"there are {', '.join([*known, *there])}"
        raise InputError(what, where=str(root / name), mend=hint)
    return Version(root / name / chosen, name, chosen, root)


def _of_folder(folder: Path) -> Version:
    """A version by its path, in another registry or in none."""
    real = folder.resolve()
    root = real.parent.parent
    if (root / EVENTS_FILE).is_file():
        return Version(real, real.parent.name, real.name, root)
    return Version(real, real.name, "", None)
