"""Content-addressed artifacts: one folder a stage, complete or absent, found again by what went into it.

    store = Store(Path("artifacts"))
    spec = Spec("corpus", config=config, inputs={"target": digest}, seed=0)
    artifact = store.obtain(spec, make=write_corpus)  # or: with store.create(spec) as work: ...

A stage writes into `<root>/<kind>/.partial-<key>`, which survives a kill so that long work resumes in it. On a clean
exit its files are digested and fsynced, the manifest is written, and the folder gets its final name in one rename. It
knows nothing of what the files mean.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from inference.errors import InputError
from pipelines import provenance
from pipelines.files import (
    canonical_json,
    fsync_path,
    fsync_tree,
    plain,
    read_json,
    sha256_bytes,
    sha256_file,
    side_by_side,
    write_json,
    writing,
)
from train.memory import Took, watched

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STABLE = ("kind", "schema_version", "config", "inputs", "seed", "files")
"""Keys of a manifest that its digest covers: what went in and what came out, never when, where or how fast."""


@dataclass(frozen=True)
class Spec:
    """What an artifact is made from; two equal specs are the same artifact.

    Attributes:
        kind: the stage, also the folder: "corpus", "draft", "score".
        config: the part of the configuration that decides the result (dataclasses are welcome).
        inputs: digests of what the stage reads, by name.
        seed: seed of the stage.
        schema_version: raised when the layout of this kind of artifact changes, which makes old ones unknown.
    """

    kind: str
    config: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    schema_version: int = 1

    def stable(self) -> dict[str, Any]:
        """The spec as plain data, secrets hidden."""
        return {
            "kind": self.kind,
            "schema_version": self.schema_version,
            "config": provenance.redacted(plain(self.config)),
            "inputs": dict(sorted(self.inputs.items())),
            "seed": self.seed,
        }

    @property
    def key(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON of the spec."""
        return sha256_bytes(canonical_json(self.stable()))[:16]


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk.

    Attributes:
        path: its folder.
        manifest: what `manifest.json` says.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> "Artifact":
        """Read an artifact's manifest.

        Raises:
            InputError: there is no manifest, or it is not one of ours.
        """
        manifest = read_json(path / MANIFEST)
        if not isinstance(manifest, dict) or not set(STABLE) <= manifest.keys():
            raise InputError(
                "not the manifest of an artifact", where=str(path / MANIFEST), mend="remove the folder and run again"
            )
        return cls(path, manifest)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the manifest's stable part: config, inputs, seed and files, not timings or places."""
        return sha256_bytes(canonical_json({name: self.manifest[name] for name in STABLE}))

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage measured."""
        metrics: dict[str, Any] = self.manifest["metrics"]
        return metrics

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            InputError: a file is missing, or is not the one that was written; the message names it.
        """
        side_by_side(self._verify, list(self.manifest["files"]))

    def _verify(self, name: str) -> None:
        file, expected = self.path / name, self.manifest["files"][name]
        if not file.is_file():
            raise InputError("a file of the artifact is missing", where=str(file), mend=_MEND)
        if file.stat().st_size != expected["bytes"] or sha256_file(file) != expected["sha256"]:
            raise InputError("a file of the artifact was changed or damaged", where=str(file), mend=_MEND)


_MEND = "remove the artifact's folder and run again, which makes it anew"


@dataclass
class Work:
    """An artifact being written.

    Attributes:
        folder: where to write; it may hold what an earlier, killed run left there.
        metrics: numbers for the manifest.
        keep: globs (relative to the folder, `*` crosses `/`) of files that stay in the artifact but not in its
            manifest, so that neither digest nor `verify` knows them: logs, timings.
        drop: globs of files that are deleted when the work is complete: checkpoints, shards that were merged.
        artifact: the finished artifact, set when the block has ended.
    """

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    keep: set[str] = field(default_factory=set)
    drop: set[str] = field(default_factory=set)
    artifact: Artifact | None = None


class Store:
    """All artifacts below one folder.

    Args:
        root: the folder; it is made when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, spec: Spec) -> Path:
        """The folder an artifact has, or would have."""
        return self.root / spec.kind / spec.key

    def find(self, spec: Spec) -> Artifact | None:
        """Return the complete artifact of this spec, if there is one."""
        path = self.path(spec)
        return Artifact.load(path) if (path / MANIFEST).is_file() else None

    def obtain(self, spec: Spec, *, make: Callable[[Work], None]) -> Artifact:
        """Return the artifact of this spec, calling `make` only when it does not exist yet.

        When another process is making it, this one waits and takes the result.
        """
        found = self.find(spec)
        if found is None:
            with self._locked(spec):
                found = self.find(spec) or self._sealed(spec)
                if found is None:
                    with self._working(spec) as work:
                        make(work)
                    assert work.artifact is not None, "a block that ended cleanly leaves an artifact"
                    return work.artifact
        log.info("%s %s: unchanged, skipped", spec.kind, spec.key)
        return found

    @contextmanager
    def create(self, spec: Spec) -> Iterator[Work]:
        """Make an artifact: write into `work.folder`; a clean end of the block completes it.

        When the block raises, the partial folder stays for a later run to resume in.

        Raises:
            InputError: the disk is full or read only, or permission is missing.
        """
        with self._locked(spec), self._working(spec) as work:
            yield work

    def _sealed(self, spec: Spec) -> Artifact | None:
        """Finish an artifact whose run was killed between its manifest and its name. The lock is held."""
        final = self.path(spec)
        partial = final.with_name(f".partial-{spec.key}")
        if not (partial / MANIFEST).is_file():
            return None
        Artifact.load(partial).verify()
        with writing(final):
            return _rename(partial, final)

    @contextmanager
    def _locked(self, spec: Spec) -> Iterator[None]:
        """Hold this artifact's lock, waiting for another process that is making the same."""
        lock = FileLock(self.root / spec.kind / f".lock-{spec.key}")
        with writing(self.root / spec.kind):
            (self.root / spec.kind).mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("%s %s: another run is making it, waiting", spec.kind, spec.key)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _working(self, spec: Spec) -> Iterator[Work]:
        """The partial folder, completed on a clean exit. The lock is held."""
        final = self.path(spec)
        partial = final.with_name(f".partial-{spec.key}")
        with writing(partial), watched() as watch:
            resumed = partial.exists()
            if resumed:
                log.info("%s %s: resuming in %s", spec.kind, spec.key, partial)
            partial.mkdir(exist_ok=True)
            (partial / MANIFEST).unlink(missing_ok=True)
            work = Work(partial)
            yield work
            took = watch.took()
            _seal(spec, work, took, resumed=resumed)
            work.artifact = _rename(partial, final)
            work.folder = final
            _drop(final, work.drop)
            log.info(
                "%s %s: made in %.0f s, peak memory %.0f MiB",
                spec.kind,
                spec.key,
                took.seconds,
                took.resident_bytes / 2**20,
            )


def _seal(spec: Spec, work: Work, took: Took, *, resumed: bool) -> None:
    """Flush the files, then write the manifest: a partial folder that has one lacks nothing but its name."""
    (work.folder / MANIFEST).unlink(missing_ok=True)
    files = _files(work.folder, leave_out=work.keep | work.drop)
    fsync_tree(work.folder)
    manifest = {
        **spec.stable(),
        "files": files,
        "metrics": plain(work.metrics),
        "took": {**asdict(took), "resumed": resumed},
        **provenance.collect(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(work.folder / MANIFEST, manifest)


def _rename(partial: Path, final: Path) -> Artifact:
    """Give a sealed folder its name; one made earlier under that name makes way."""
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    fsync_path(final.parent)
    return Artifact.load(final)


def _matches(name: str, globs: set[str]) -> bool:
    return any(fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}/*") for glob in globs)


def _drop(folder: Path, globs: set[str]) -> None:
    """Delete what matches, and folders that are empty afterwards."""
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if _matches(name, globs) and not any(path.iterdir()):
                path.rmdir()
        elif _matches(name, globs):
            path.unlink()


def _files(folder: Path, *, leave_out: set[str]) -> dict[str, dict[str, Any]]:
    """Digest and size of every file that belongs to the artifact, by relative path, sorted."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in found if not _matches(name, leave_out) and not name.endswith(".aside")]

    def entry(name: str) -> dict[str, Any]:
        return {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}

    return dict(zip(names, side_by_side(entry, names), strict=True))
