"""The prompts of a cycle, fixed before anything is made from them: recent traffic, split into what is learned from and
what only the gate sees.

A prompt's side is decided by a hash of its text, so that it stays on that side in every later cycle.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from inference.errors import InputError
from inference.traffic import TrafficRecord
from pipelines.artifacts import Artifact, Spec, Store, Work
from pipelines.files import canonical_json, sha256_bytes, write_text

TRAIN_FILE, HELDOUT_FILE = "train.jsonl", "heldout.jsonl"
_HASH_RANGE = 2**32


def usable(records: Iterable[TrafficRecord]) -> list[TrafficRecord]:
    """Single requests whose prompt was kept, one for each different prompt, latest first."""
    found: dict[str, TrafficRecord] = {}
    for record in records:
        if record.prompt and record.requests == 1:
            found[record.prompt_digest] = record
    return sorted(found.values(), key=lambda record: (-record.time, record.id))


def is_heldout(prompt_digest: str, share: float) -> bool:
    """Whether a prompt is one that only the gate sees; the same for the same text and share, whatever else is there."""
    position = int(hashlib.sha256(f"heldout/{prompt_digest}".encode()).hexdigest()[:8], 16)
    return position < share * _HASH_RANGE


def take_snapshot(
    store: Store, records: Iterable[TrafficRecord], *, recent: int, heldout_share: float, where: str
) -> Artifact:
    """Write the prompts of the latest requests into an artifact, or find it.

    Args:
        store: of artifacts.
        records: of the traffic log.
        recent: most requests.
        heldout_share: share of prompts that only the gate sees.
        where: the log, for errors.

    Raises:
        InputError: the log holds too few different prompts to learn from and to judge by.
    """
    chosen = usable(records)[:recent]
    lines: dict[str, list[str]] = {TRAIN_FILE: [], HELDOUT_FILE: []}
    for record in sorted(chosen, key=lambda record: record.prompt_digest):
        side = HELDOUT_FILE if is_heldout(record.prompt_digest, heldout_share) else TRAIN_FILE
        row = {"id": record.prompt_digest[:16], "messages": record.prompt, "domain": record.domain or "chat"}
        lines[side].append(json.dumps(row, sort_keys=True))
    if len(lines[TRAIN_FILE]) < 4 or len(lines[HELDOUT_FILE]) < 2:
        raise InputError(
            f"the log holds {len(chosen)} different prompts, too few to learn from and to judge by",
            where=where,
            mend="wait for more traffic, or log prompts with text=keep",
        )
    content = {side: "\n".join(rows) + "\n" for side, rows in lines.items()}
    digest = sha256_bytes(canonical_json(content))

    def make(work: Work) -> None:
        for side, text in content.items():
            write_text(work.folder / side, text)
        work.metrics |= {"train": len(lines[TRAIN_FILE]), "heldout": len(lines[HELDOUT_FILE])}

    return store.obtain(Spec("traffic", config={"heldout_share": heldout_share}, inputs={"log": digest}), make=make)


def count_lines(path: Path) -> int:
    """Prompts in one of the two files."""
    return len(path.read_text(encoding="utf-8").splitlines())
