"""Where a pair can be handed on to: a folder, whatever fsspec reaches (s3://, gs://, memory://), or the Hub.

    store = open_store("s3://bucket/smollm2/v3")
    store.sizes()                     # {} when nothing is there
    store.fetch("pair.json", to)

A store moves files and knows nothing of what they mean. Keys come from the environment or the log-in of the library
that speaks to it; they are neither taken as words nor printed.
"""

import hashlib
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec import available_protocols, url_to_fs
from fsspec.registry import known_implementations

from inference.errors import InputError, first_line
from pipelines.composition import nearest
from pipelines.files import replacing, sha256_file, write_bytes, writing
from pipelines.pairs.retries import retried, shown

_ASIDE = re.compile(r"\..*\.aside")


class Store(ABC):
    """A place that holds the files of one version.

    Attributes:
        where: its address, as it was given.
    """

    own_files: tuple[str, ...] = ()
    """Files there that belong to the place and not to the version."""
    at_once = False
    """Whether `put` makes all its files appear in one step, so that there is never half a version."""

    def __init__(self, where: str) -> None:
        self.where = where

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is there, by relative path; empty when the place does not exist."""

    @abstractmethod
    def fetch(self, name: str, to: Path) -> None:
        """Copy a file out of the store; whole or not at all."""

    @abstractmethod
    def digest(self, name: str) -> str:
        """SHA-256 of a file that is there."""

    @abstractmethod
    def put(self, files: Mapping[str, Path]) -> None:
        """Copy files into the store, by relative path."""

    def tidy(self) -> None:  # noqa: B027  most stores have nothing to tidy
        """Remove what a killed copy left."""


class LocalFolder(Store):
    """A folder of this machine."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.folder = Path(where.removeprefix("file://").removeprefix("local://")).expanduser()

    def sizes(self) -> dict[str, int]:
        """See `Store`.

        Raises:
            InputError: a symbolic link is among the files.
        """
        real = self.folder.resolve()
        if real.exists() and not real.is_dir():
            raise InputError("not a folder", where=str(real), mend="name the folder of a version, or a new one")
        found = {}
        for path in sorted(real.rglob("*")):
            if path.is_symlink():
                raise InputError("a symbolic link in a version", where=str(path), mend="put the file itself there")
            if path.is_file() and not _ASIDE.fullmatch(path.name):
                found[path.relative_to(real).as_posix()] = path.stat().st_size
        return found

    def fetch(self, name: str, to: Path) -> None:
        """See `Store`."""
        with replacing(to) as aside:
            shutil.copyfile(self.folder / name, aside)

    def digest(self, name: str) -> str:
        """See `Store`."""
        return sha256_file(self.folder / name)

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        for name, source in files.items():
            with replacing(self.folder / name) as aside:
                shutil.copyfile(source, aside)

    def tidy(self) -> None:
        """See `Store`."""
        with writing(self.folder):
            for path in self.folder.rglob(".*.aside"):
                path.unlink()


class FsspecStore(Store):
    """A prefix of any file system that fsspec has a back end for."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        fs, root = _file_system(where)
        self.fs: Any = fs
        self.root = root.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """See `Store`."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self.root, detail=True)
        except FileNotFoundError:
            return {}
        start = len(self.root.strip("/"))
        return {path.strip("/")[start:].strip("/"): int(info["size"] or 0) for path, info in found.items()}

    def fetch(self, name: str, to: Path) -> None:
        """See `Store`."""
        with replacing(to) as aside:
            self.fs.get_file(f"{self.root}/{name}", str(aside))

    def digest(self, name: str) -> str:
        """See `Store`; the file is read through."""
        with self.fs.open(f"{self.root}/{name}", "rb") as handle:
            whole = hashlib.sha256()
            while piece := handle.read(2**22):
                whole.update(piece)
        return whole.hexdigest()

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        for name, source in files.items():
            self.fs.put_file(str(source), f"{self.root}/{name}")


def _file_system(where: str) -> tuple[Any, str]:
    """The file system of an address and the path in it.

    Raises:
        InputError: nobody speaks this protocol, or the package that does is not installed.
    """
    protocol = where.partition("://")[0]
    known = available_protocols()
    if protocol not in known:
        hint = nearest(protocol, [*known, "hf"]) or "such as s3://, gs://, file:// or hf://"
        raise InputError(f"unknown protocol {protocol!r}", where=shown(where), mend=hint)
    try:
        fs, root = url_to_fs(where)
    except ImportError:
        package = known_implementations[protocol]["class"].partition(".")[0]
        mend = f"pip install {package}"
        raise InputError(f"{protocol}:// needs the package {package}", where=shown(where), mend=mend) from None
    except ValueError as error:
        raise InputError(f"cannot read the address: {first_line(error)}", where=shown(where)) from None
    return fs, str(root)


def open_store(where: str, *, private: bool = True) -> Store:
    """The store at an address; nothing is asked of it yet.

    Args:
        where: a folder, an fsspec address, or `hf://user/repo[@revision]`.
        private: whether a Hub repository that has to be made is private.

    Raises:
        InputError: the address cannot be used.
    """
    if where.startswith("hf://"):
        from pipelines.pairs.hub import HubStore

        return HubStore(where, private=private)
    if "://" not in where or where.startswith(("file://", "local://")):
        if not where or os.path.basename(where) == "..":
            raise InputError(f"{where!r} is no folder for a version", mend="name one, as in /backup/smollm2/v3")
        return LocalFolder(where)
    return FsspecStore(where)


def read(store: Store, name: str, *, through: Path) -> bytes:
    """A small file of a store, by way of a temporary one.

    Args:
        store: where it is.
        name: of the file.
        through: a folder for the temporary file.
    """
    to = through / name.replace("/", "_")
    retried(lambda: store.fetch(name, to), where=store.where)
    content = to.read_bytes()
    to.unlink()
    return content


def write(store: Store, name: str, content: bytes, *, through: Path) -> None:
    """Write a small file into a store, by way of a temporary one."""
    source = through / name.replace("/", "_")
    write_bytes(source, content)
    retried(lambda: store.put({name: source}), where=store.where)
    source.unlink()
