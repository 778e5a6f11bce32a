"""What a pair's re-alignments leave behind: the cycle that runs, and those that ended.

A cycle is written down before it makes anything and removed after its end is in the history, so a run that was killed
anywhere in between goes on with the same prompts and the same reasons, and ends the same.
"""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from inference.errors import InputError
from pipelines.files import read_json, write_json, write_text

FOLDER = ".realign"
CYCLE_FILE, HISTORY_FILE = "cycle.json", "history.jsonl"
PROMOTED, KEPT, GAVE_UP = "promoted", "kept", "gave_up"


@dataclass(frozen=True)
class Cycle:
    """A re-alignment under way.

    Attributes:
        id: digest of what it is made from.
        started: UTC, ISO 8601.
        champion: version it began with.
        target_digest: of the target it aligns to.
        snapshot: key of the artifact with its prompts.
        failures: cycles in a row that had ended without promotion before it.
        why: what set it off.
    """

    id: str
    started: str
    champion: str
    target_digest: str
    snapshot: str
    failures: int
    why: list[str]


@dataclass(frozen=True)
class Ended:
    """A re-alignment that has ended.

    Attributes:
        id: of the cycle.
        started: UTC, ISO 8601.
        ended: likewise.
        outcome: `promoted`, `kept` or `gave_up`.
        reason: in a sentence.
        champion: version it began with.
        version: the new one, empty without promotion.
        target_digest: of the target.
        evidence: digests of its artifacts by kind.
        figures: what was measured.
    """

    id: str
    started: str
    ended: str
    outcome: str
    reason: str
    champion: str
    version: str
    target_digest: str
    evidence: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def now() -> datetime:
    """The present time; a function of its own so that tests can move it."""
    return datetime.now(UTC)


def open_cycle(pair: Path) -> Cycle | None:
    """The cycle under way below a pair's registry folder, if there is one.

    Raises:
        InputError: its file cannot be read.
    """
    path = pair / FOLDER / CYCLE_FILE
    if not path.is_file():
        return None
    try:
        return Cycle(**read_json(path))
    except TypeError:
        raise InputError("not a cycle of this version", where=str(path), mend="remove the file to start anew") from None


def begin(pair: Path, cycle: Cycle) -> None:
    """Write a cycle down before it makes anything."""
    (pair / FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(pair / FOLDER / CYCLE_FILE, asdict(cycle))


def abandon(pair: Path) -> None:
    """Forget the cycle under way; what it made stays where it is."""
    (pair / FOLDER / CYCLE_FILE).unlink(missing_ok=True)


def history(pair: Path) -> list[Ended]:
    """Every cycle that has ended, oldest first.

    Raises:
        InputError: the file was changed by hand into something else.
    """
    path = pair / FOLDER / HISTORY_FILE
    if not path.is_file():
        return []
    try:
        return [Ended(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise InputError(f"unreadable history: {error}", where=str(path), mend="mend or remove the file") from None


def end(pair: Path, ended: Ended) -> None:
    """Put an ended cycle into the history, once, and forget it as the one under way."""
    past = history(pair)
    if all(other.id != ended.id for other in past):
        lines = "".join(json.dumps(asdict(one), sort_keys=True) + "\n" for one in [*past, ended])
        write_text(pair / FOLDER / HISTORY_FILE, lines)
    abandon(pair)


def failures(past: list[Ended], target_digest: str) -> int:
    """Cycles in a row, up to the latest, that ended without promotion on this target."""
    count = 0
    for one in reversed(past):
        if one.outcome == PROMOTED or one.target_digest != target_digest:
            break
        count += 1
    return count


def must_wait(past: list[Ended], *, cooldown_hours: float, max_per_day: int) -> str:
    """Why no cycle may start now; empty when one may."""
    if not past:
        return ""
    present = now()
    ends = [datetime.fromisoformat(one.ended) for one in past]
    ready = ends[-1] + timedelta(hours=cooldown_hours)
    if present < ready:
        return f"the last cycle ended at {past[-1].ended}; cooling down until {ready.isoformat(timespec='seconds')}"
    today = sum(present - when < timedelta(days=1) for when in ends)
    if today >= max_per_day:
        return f"{today} cycles in the last 24 hours, realign.max_per_day allows {max_per_day}"
    return ""
