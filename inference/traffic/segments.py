"""The log's files as they lie on the disk: numbered segments of lines, counts beside them, and a reader for both.

A line is whole, torn or damaged. One that was being written when its process was killed ends without a line break: it
is cut off before the next is written (`repair`), and counted. A damaged line in the middle is passed over and counted.
Nothing here decides when a segment is full or is dropped.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from inference.errors import InputError
from inference.traffic.records import NewerSchema, TrafficRecord

logger = logging.getLogger(__name__)

COUNTS_FILE = "counts.json"
RESERVOIR_FILE = "reservoir.jsonl"
HARD_FILE = "hard.jsonl"
LOCK_FILE = ".lock"
LOCK_WAIT_S = 30.0
_SEGMENT = re.compile(r"traffic-(\d{6,})\.jsonl")


@dataclass(frozen=True)
class Traffic:
    """What a log holds.

    Attributes:
        records: of the segments that are there, oldest first.
        torn: torn and damaged lines, those of dropped segments included.
        newer: lines that a later version of dspark wrote, passed over, in the segments that are there.
        segments: that are there.
        nbytes: of these segments, samples apart.
        dropped: records of the segments that were dropped; samples may still hold them.
    """

    records: list[TrafficRecord]
    torn: int
    newer: int
    segments: int
    nbytes: int
    dropped: int


@dataclass
class Counts:
    """What would be forgotten with the lines it speaks of; `counts.json`.

    Attributes:
        cut: torn lines that were cut off.
        cutting: place of the cut that is being made, "" when none is: a kill between counting and cutting counts once.
        dropped_through: number of the latest segment that was dropped.
        dropped_records: records of dropped segments.
        dropped_torn: damaged lines of dropped segments.
    """

    cut: int = 0
    cutting: str = ""
    dropped_through: int = 0
    dropped_records: int = 0
    dropped_torn: int = 0

    @classmethod
    def read(cls, folder: Path) -> "Counts":
        """From the folder; zeros where there is no file, or one that cannot be read."""
        try:
            data = json.loads((folder / COUNTS_FILE).read_bytes())
            counts = cls(**{field.name: field.type(data[field.name]) for field in fields(cls)})  # type: ignore[operator]
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError):
            # Only counts are lost by it, and it must not keep requests from being logged.
            logger.warning("%s is damaged; counting starts anew", folder / COUNTS_FILE)
            return cls()
        return counts

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        write_whole(folder / COUNTS_FILE, [json.dumps(asdict(self))])


def segment_number(path: Path) -> int:
    """Number of a segment."""
    found = _SEGMENT.fullmatch(path.name)
    assert found, f"{path} is no segment"
    return int(found[1])


def segment_path(folder: Path, number: int) -> Path:
    """Where a segment lies."""
    return folder / f"traffic-{number:06d}.jsonl"


def segment_paths(folder: Path) -> list[Path]:
    """Segments of a log, oldest first."""
    return sorted((path for path in folder.iterdir() if _SEGMENT.fullmatch(path.name)), key=segment_number)


def log_lock(folder: Path) -> FileLock:
    """The lock that everything which writes to a log holds; the kernel's, so that a killed process holds nothing."""
    return FileLock(folder / LOCK_FILE, timeout=LOCK_WAIT_S, poll_interval=0.002, preserve_lock_file=True)


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write lines aside, fsync, rename. The lock is held.

    Raises:
        OSError: the disk is full or cannot be written; an older file stays as it was.
    """
    aside = path.with_name(f".{path.name}.aside")
    try:
        with aside.open("w", encoding="ascii", newline="\n") as handle:
            handle.writelines(f"{line}\n" for line in lines)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush names, so that no later step outlives a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def repair(path: Path, handle: int, counts: Counts) -> None:
    """Cut off a torn last line, or end one that only lacks its line break. The lock is held.

    Args:
        path: of the newest segment.
        handle: open for reading and appending.
        counts: of the folder; a cut is added.

    Raises:
        OSError: the disk cannot be written.
    """
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        if counts.cutting:  # a kill came between cutting and saying so
            counts.cutting = ""
            counts.write(path.parent)
        return
    start = _last_break(handle, size)
    if is_record(os.pread(handle, size - start, start)):
        os.write(handle, b"\n")
        return
    place = f"{path.name}:{start}"
    if counts.cutting != place:
        counts.cut, counts.cutting = counts.cut + 1, place
        counts.write(path.parent)
    os.ftruncate(handle, start)
    os.fsync(handle)
    counts.cutting = ""
    counts.write(path.parent)
    logger.warning("a torn line was cut off %s at byte %d", path, start)


def is_record(line: bytes) -> bool:
    """Whether a line is whole, of this schema or of a newer one."""
    try:
        TrafficRecord.from_json(line)
    except NewerSchema:
        return True
    except ValueError:
        return False
    return True


def _last_break(handle: int, size: int) -> int:
    """Offset just behind the last line break, 0 without one."""
    end, step = size, 1 << 16
    while end > 0:
        start = max(0, end - step)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class Lines:
    """Reads the records of one segment and counts what is none.

    Attributes:
        path: of the segment.
        records: read so far.
        torn: torn or damaged lines so far.
        newer: lines of a newer schema so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records, self.torn, self.newer = 0, 0, 0

    def read(self, handle: BinaryIO) -> Iterator[TrafficRecord]:
        """Every record, oldest first.

        Raises:
            InputError: all that could be read is of a newer schema.
        """
        said = ""
        for line in handle:
            try:
                record = TrafficRecord.from_json(line)
            except NewerSchema as error:
                self.newer, said = self.newer + 1, str(error)
            except ValueError:
                self.torn += 1
            else:
                self.records += 1
                yield record
        if self.newer and not self.records:
            raise InputError(f"this log has {said}", where=str(self.path), mend="use a matching version of dspark")


class Snapshot:
    """The files of a log as they were at one moment, however it is written or dropped while they are read.

    Attributes:
        folder: of the log.
        counts: what is known of lines that are gone.
        segments: open files, oldest first; unlinking one does not end it.
        samples: open sample files, by name.
    """

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder, self.counts = folder, Counts.read(folder)
        paths = [path for path in segment_paths(folder) if segment_number(path) > self.counts.dropped_through]
        self.segments = [(Lines(path), files.enter_context(path.open("rb"))) for path in paths]
        names = [name for name in (RESERVOIR_FILE, HARD_FILE) if (folder / name).is_file()]
        self.samples = {name: files.enter_context((folder / name).open("rb")) for name in names}
        self._sizes = [os.fstat(handle.fileno()).st_size for _, handle in self.segments]

    @property
    def nbytes(self) -> int:
        """Of all segments."""
        return sum(self._sizes)

    @property
    def torn(self) -> int:
        """Torn and damaged lines, once all records were read."""
        counts, place = self.counts, self.counts.cutting.rpartition(":")
        # A cut that was counted but not made: the line is still there and was counted a second time.
        twice = any(
            lines.path.name == place[0] and size > int(place[2])
            for (lines, _), size in zip(self.segments, self._sizes, strict=True)
        )
        return counts.cut + counts.dropped_torn + self.seen(lambda lines: lines.torn) - twice

    def records(self) -> Iterator[TrafficRecord]:
        """Of all segments, oldest first; warns once of lines that were passed over.

        Raises:
            InputError: a segment is of a newer schema.
        """
        for (lines, handle), size in zip(self.segments, self._sizes, strict=True):
            yield from lines.read(_Bounded(handle, size))  # type: ignore[arg-type]
        torn, newer = self.seen(lambda lines: lines.torn), self.seen(lambda lines: lines.newer)
        if torn or newer:
            where = next(lines.path for lines, _ in self.segments if lines.torn or lines.newer)
            logger.warning("%d damaged lines and %d of a newer schema passed over, first in %s", torn, newer, where)

    def seen(self, count: Callable[[Lines], int]) -> int:
        """Sum of a count over the segments read so far."""
        return sum(count(lines) for lines, _ in self.segments)


class _Bounded:
    """Lines of a file up to a size: what is appended later is not of the moment."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self._handle, self._left = handle, size

    def __iter__(self) -> Iterator[bytes]:
        while self._left > 0 and (line := self._handle.readline(self._left)):
            self._left -= len(line)
            yield line


@contextmanager
def snapshot(folder: Path) -> Iterator[Snapshot]:
    """Open the files of a log for reading.

    The lock is held only while they are opened. A log that this process may not write is opened without it: a line that
    is being written then counts as torn.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise InputError("no traffic log here", where=str(folder), mend="give the folder that requests were logged to")
    with ExitStack() as files:
        try:
            if os.access(folder, os.W_OK):
                with log_lock(folder):
                    found = Snapshot(folder, files)
            else:
                found = Snapshot(folder, files)
        except OSError as error:
            raise InputError(
                f"the log cannot be read ({error.strerror or error})", where=str(folder), mend="check its permissions"
            ) from error
        yield found


def read_traffic(folder: str | Path) -> Traffic:
    """Read what a log holds.

    Raises:
        InputError: there is no such folder, it cannot be read, or a segment is of a newer schema.
    """
    with snapshot(Path(folder)) as files:
        records = list(files.records())
        return Traffic(
            records=records,
            torn=files.torn,
            newer=files.seen(lambda lines: lines.newer),
            segments=len(files.segments),
            nbytes=files.nbytes,
            dropped=files.counts.dropped_records,
        )
