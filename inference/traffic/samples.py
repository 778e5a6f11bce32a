"""Samples of every request ever logged, which outlive the segments that are dropped.

Each request has a key, a hash of the seed and its id. The uniform sample is the requests with the lowest keys: which
these are depends neither on their order nor on how often, or in how many parts, they are merged. So a merge that was
killed is simply made again. Intervals of an engine's counters are no requests and never in a sample.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from inference.errors import InputError
from inference.traffic.records import SCHEMA_VERSION, NewerSchema, TrafficRecord
from inference.traffic.segments import HARD_FILE, RESERVOIR_FILE, snapshot, write_whole

Key = tuple[float, str]


def sample_key(request_id: str, *, seed: int) -> str:
    """Hex sha256 that orders requests at random."""
    return hashlib.sha256(f"{seed}/{request_id}".encode()).hexdigest()


@dataclass
class Sample:
    """A sample as its file holds it: a head line, then records.

    Attributes:
        records: in it.
        seed: of the keys.
        limit: lowest key of a request that did not fit, "" while all fitted. Below it the sample knows everyone.
    """

    records: list[TrafficRecord]
    seed: int
    limit: str = ""

    @classmethod
    def read(cls, handle: BinaryIO | None, *, seed: int, where: Path) -> "Sample":
        """From its file, empty with `seed` where there is none.

        Raises:
            InputError: it is damaged, or of a newer schema.
        """
        if handle is None:
            return cls([], seed)
        try:
            lines = handle.read().splitlines()
            head: dict[str, Any] = json.loads(lines[0])
            if head["schema_version"] > SCHEMA_VERSION:
                raise NewerSchema
            return cls([TrafficRecord.from_json(line) for line in lines[1:]], int(head["seed"]), str(head["limit"]))
        except NewerSchema:
            raise InputError(
                "a newer version wrote this sample", where=str(where), mend="use a matching version of dspark"
            ) from None
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise InputError(f"the sample is damaged ({error})", where=str(where), mend="move it away") from None

    def write(self, path: Path) -> None:
        """Whole or not at all.

        Raises:
            OSError: the disk cannot be written.
        """
        head = {"schema_version": SCHEMA_VERSION, "seed": self.seed, "limit": self.limit}
        write_whole(path, [json.dumps(head, sort_keys=True), *(record.to_json() for record in self.records)])

    def key(self, record: TrafficRecord) -> Key:
        """What the uniform sample is ordered by."""
        return (0.0, sample_key(record.id, seed=self.seed))

    def hardness(self, record: TrafficRecord) -> Key:
        """What the hard sample is ordered by: the acceptance rate, then the key."""
        return (math.inf if record.rate is None else record.rate, sample_key(record.id, seed=self.seed))

    def known(self, records: Iterable[TrafficRecord]) -> Iterator[TrafficRecord]:
        """Those of the records, and of its own, whose keys lie below the limit."""
        for record in _both(self.records, records):
            if record.single and (not self.limit or self.key(record)[1] < self.limit):
                yield record

    def hardest(self, records: Iterable[TrafficRecord]) -> Iterator[TrafficRecord]:
        """Those of the records, and of its own, that verified anything."""
        return (record for record in _both(self.records, records) if record.single and record.rate is not None)


def _both(first: Iterable[TrafficRecord], second: Iterable[TrafficRecord]) -> Iterator[TrafficRecord]:
    yield from first
    yield from second


def lowest(
    records: Iterable[TrafficRecord], *, count: int, key: Callable[[TrafficRecord], Key]
) -> tuple[list[TrafficRecord], Key | None]:
    """The records with the lowest keys, in their order, and the lowest key that did not fit.

    Of records with one id only the first counts. Holds about twice `count` at a time.
    """
    held: dict[str, tuple[Key, TrafficRecord]] = {}
    limit: Key | None = None

    def prune() -> None:
        nonlocal held, limit
        ordered = sorted(held.items(), key=lambda item: item[1][0])
        if ordered[count:]:
            left_out = ordered[count][1][0]
            limit = left_out if limit is None else min(limit, left_out)
        held = dict(ordered[:count])

    for record in records:
        found = key(record)
        if record.id not in held and (limit is None or found < limit):
            held[record.id] = (found, record)
            if len(held) > 2 * count + 1000:
                prune()
    prune()
    return [record for _, record in held.values()], limit


def merge_reservoir(sample: Sample, records: Iterable[TrafficRecord], *, count: int) -> Sample:
    """The uniform sample with more requests in it; merging the same ones again changes nothing."""
    kept, left_out = lowest(sample.known(records), count=count, key=sample.key)
    limits = [limit for limit in (sample.limit, left_out[1] if left_out else "") if limit]
    return Sample(kept, sample.seed, min(limits, default=""))


def merge_hard(sample: Sample, records: Iterable[TrafficRecord], *, count: int) -> Sample:
    """The hard sample with more requests in it; merging the same ones again changes nothing."""
    kept, _ = lowest(sample.hardest(records), count=count, key=sample.hardness)
    return Sample(kept, sample.seed)


def uniform_sample(folder: str | Path, count: int, *, seed: int = 0) -> list[TrafficRecord]:
    """A uniform sample, without replacement, of every request ever logged.

    Args:
        folder: of the log.
        count: requests wanted. Fewer come where fewer were logged; and once segments were dropped, where the log's own
            `reservoir` is smaller: more would not be uniform.
        seed: of the choice.

    Raises:
        InputError: there is no such log, a file of it is damaged or of a newer schema.
        ValueError: a negative count.
    """
    _check_count(count)
    with snapshot(Path(folder)) as files:
        stored = Sample.read(files.samples.get(RESERVOIR_FILE), seed=seed, where=files.folder / RESERVOIR_FILE)
        # With the limit under the log's seed what is left is uniform; choosing from it by another seed keeps it so.
        return lowest(stored.known(files.records()), count=count, key=Sample([], seed).key)[0]


def hard_sample(folder: str | Path, count: int) -> list[TrafficRecord]:
    """The requests with the lowest acceptance of all that were ever logged, the lowest first; ties by a hash.

    Requests that verified nothing are left out.

    Args:
        folder: of the log.
        count: requests wanted. Once segments were dropped only as many as the log's own `hard` are the lowest of all;
            any more are the lowest of those that are still known.

    Raises:
        InputError: there is no such log, a file of it is damaged or of a newer schema.
        ValueError: a negative count.
    """
    _check_count(count)
    with snapshot(Path(folder)) as files:
        stored = Sample.read(files.samples.get(HARD_FILE), seed=0, where=files.folder / HARD_FILE)
        return lowest(stored.hardest(files.records()), count=count, key=stored.hardness)[0]


def _check_count(count: int) -> None:
    if count < 0:
        raise ValueError(f"count is {count}; use 0 or more")
