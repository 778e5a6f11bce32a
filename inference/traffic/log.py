"""The writer of the log. Several processes may append to one folder; none of them ever waits for a full disk.

    log = TrafficLog(Path("traffic"), config=TrafficConfig(text="hash"))
    log.append(record)
    read_traffic("traffic").records

A line is one write to the end of the newest segment, under a lock. When the segments would outgrow their bound, the
oldest is merged into the samples, which are written aside, fsynced and renamed, and only then is it unlinked. A process
may be killed anywhere in between: what was not finished is done again by the next append.
"""

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from inference.errors import InputError
from inference.traffic.records import NewerSchema, TrafficRecord
from inference.traffic.samples import Sample, merge_hard, merge_reservoir
from inference.traffic.segments import (
    HARD_FILE,
    RESERVOIR_FILE,
    Counts,
    Lines,
    log_lock,
    repair,
    segment_number,
    segment_path,
    segment_paths,
    sync_folder,
)

logger = logging.getLogger(__name__)

KEEP, HASH, DROP = "keep", "hash", "drop"
MOST_SEGMENTS = 256
"""A reader opens them all at once."""


@dataclass
class TrafficConfig:
    """How much of the traffic is kept.

    Attributes:
        segment_mb: size of a segment, in units of 10^6 bytes. A record that is longer is kept without its texts.
        max_mb: bound on all segments together, likewise; samples come on top of it.
        text: "keep" texts, "hash" keeps their sha256 alone, "drop" keeps neither.
        text_share: share of requests whose texts are kept under "keep", chosen by a hash of their ids; the others' are
            hashed. 1 keeps all.
        reservoir: requests in the uniform sample.
        hard: requests in the sample of the lowest acceptance.
        seed: of the samples; a log whose samples were begun keeps its own.
    """

    segment_mb: float = 16.0
    max_mb: float = 256.0
    text: str = KEEP
    text_share: float = 1.0
    reservoir: int = 2000
    hard: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.segment_mb <= self.max_mb <= self.segment_mb * MOST_SEGMENTS:
            raise ValueError(
                f"segment_mb is {self.segment_mb}, max_mb is {self.max_mb}; use 1 to {MOST_SEGMENTS} segments, as in "
                f"16 and 256"
            )
        if self.text not in (KEEP, HASH, DROP):
            raise ValueError(f"text is {self.text!r}; use {KEEP}, {HASH} or {DROP}")
        if not 0.0 <= self.text_share <= 1.0:
            raise ValueError(f"text_share is {self.text_share}; use a share from 0 to 1")
        if min(self.reservoir, self.hard) < 0:
            raise ValueError(f"reservoir is {self.reservoir}, hard is {self.hard}; use 0 or more")

    @property
    def segment_bytes(self) -> int:
        """Size of a segment in bytes."""
        return int(self.segment_mb * 1e6)

    @property
    def max_bytes(self) -> int:
        """Bound on all segments in bytes."""
        return int(self.max_mb * 1e6)

    def private(self, record: TrafficRecord) -> TrafficRecord:
        """The record without the texts and digests that are not to be kept."""
        if self.text == DROP:
            return replace(record, prompt=None, response=None, prompt_digest="", response_digest="")
        if self.text == HASH or _share(record.id) >= self.text_share:
            return replace(record, prompt=None, response=None)
        return record


def _share(request_id: str) -> float:
    """A number in [0, 1) that an id always has, apart from its keys in the samples."""
    return int(hashlib.sha256(f"text/{request_id}".encode()).hexdigest()[:12], 16) / 16**12


class TrafficLog:
    """Appends records to the log in a folder. Threads and processes may share the folder.

    Attributes:
        folder: of the log.
        config: how much is kept.
        lost: records that could not be written, by this object.

    Raises:
        InputError: the folder cannot be made, or a newer version of dspark writes to it.
    """

    def __init__(self, folder: str | Path, *, config: TrafficConfig | None = None) -> None:
        self.folder, self.config = Path(folder), config or TrafficConfig()
        self.lost = 0
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            newest = segment_paths(self.folder)[-1:]
        except OSError as error:
            raise InputError(
                f"no traffic log can be kept here ({error.strerror or error})",
                where=str(self.folder),
                mend="choose a folder that can be written",
            ) from error
        for path in newest:
            _refuse_newer(path)
        self._lock = log_lock(self.folder)
        try:
            with self._lock:
                self._mended(Counts.read(self.folder))
        except OSError as error:
            self._warn(error)

    def append(self, record: TrafficRecord) -> None:
        """Add one record. What keeps it from being written is warned of once; serving goes on.

        Raises:
            ValueError: the record holds a number that JSON has no word for.
        """
        record = self.config.private(record)
        line = f"{record.to_json()}\n".encode("ascii")
        if len(line) > self.config.segment_bytes:
            line = f"{replace(record, prompt=None, response=None).to_json()}\n".encode("ascii")
        try:
            with self._lock:
                self._add(line)
        except (OSError, InputError) as error:
            self.lost += 1
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("traffic cannot be logged to %s, requests are served all the same: %s", self.folder, error)

    def _mended(self, counts: Counts) -> list[Path]:
        """Segments, oldest first, after what a killed process left undone was done."""
        paths = segment_paths(self.folder)
        while paths and segment_number(paths[0]) <= counts.dropped_through:
            self._unlink(paths.pop(0))
        if paths:
            with _opened(paths[-1]) as handle:
                repair(paths[-1], handle, counts)
        return paths

    def _add(self, line: bytes) -> None:
        """One write of a whole line behind whole lines; the oldest segments are dropped to make room for it."""
        counts = Counts.read(self.folder)
        paths = self._mended(counts)
        sizes = [path.stat().st_size for path in paths]
        last = segment_number(paths[-1]) if paths else counts.dropped_through
        while paths and sum(sizes) + len(line) > self.config.max_bytes:
            self._drop(paths.pop(0), counts)
            sizes.pop(0)
        fits = bool(paths) and sizes[-1] + len(line) <= self.config.segment_bytes
        with _opened(paths[-1] if fits else segment_path(self.folder, last + 1)) as handle:
            size = os.fstat(handle).st_size
            try:
                if os.write(handle, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(handle, size)  # what was written of a line that did not fit
                raise

    def _drop(self, path: Path, counts: Counts) -> None:
        """Bring samples and counts to where they no longer need a segment, then unlink it; in this order."""
        lines = Lines(path)
        with path.open("rb") as handle:
            records = [record for record in lines.read(handle) if record.single]
        uniform = merge_reservoir(self._sample(RESERVOIR_FILE), records, count=self.config.reservoir)
        uniform.write(self.folder / RESERVOIR_FILE)
        hard = merge_hard(self._sample(HARD_FILE), records, count=self.config.hard)
        hard.write(self.folder / HARD_FILE)
        counts.dropped_through = segment_number(path)
        counts.dropped_records += lines.records
        counts.dropped_torn += lines.torn + lines.newer
        counts.write(self.folder)
        self._unlink(path)

    def _unlink(self, path: Path) -> None:
        path.unlink()
        sync_folder(self.folder)

    def _sample(self, name: str) -> Sample:
        path = self.folder / name
        if not path.is_file():
            return Sample([], self.config.seed)
        with path.open("rb") as handle:
            return Sample.read(handle, seed=self.config.seed, where=path)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A segment, open for reading and appending; made where it is not there."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _refuse_newer(path: Path) -> None:
    """Look at the first line of a segment.

    Raises:
        InputError: a newer version wrote it.
    """
    try:
        with path.open("rb") as handle:
            TrafficRecord.from_json(handle.readline())
    except NewerSchema as error:
        raise InputError(
            f"this log has {error}", where=str(path), mend="use a matching version of dspark, or another folder"
        ) from None
    except (ValueError, OSError):
        return  # torn or damaged lines are repaired or passed over later
