"""Where metrics and lineage go besides the log, one module a choice. A tracker can fail; training never stops for it.

    tracker.log(10, {"loss": 1.5})
    tracker.artifact(TrackedArtifact("draft", "pruned", digest), uses=[TrackedArtifact("corpus", "mine", other)])
    tracker.finish()

Weights are not handed over: an artifact is a name, a digest and the folder it lies in.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_LOG = logging.getLogger(__name__)
_SAID_CHARACTERS = 300


@dataclass(frozen=True)
class TrackedArtifact:
    """One version of something that is made or used.

    Attributes:
        kind: "corpus", "draft" or "pair".
        name: under which its versions are kept together; letters, digits, dots, dashes, underscores.
        digest: hex SHA-256 that says which version.
        folder: where it lies (None = not said).
    """

    kind: str
    name: str
    digest: str
    folder: Path | None = None


class Tracker(Protocol):
    """Receives metrics while training runs, and what came of what."""

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Record metrics of a step, counted from 1."""
        ...

    def artifact(
        self, made: TrackedArtifact, /, *, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]
    ) -> None:
        """Record that something was made from other things; metadata is plain data without secrets."""
        ...

    def finish(self) -> None:
        """Flush and close; called once, also when training fails."""
        ...


class NoTracker:
    """Forgets everything."""

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Do nothing."""

    def artifact(
        self, made: TrackedArtifact, /, *, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]
    ) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


@dataclass
class Fuse:
    """Shared by all trackers of one configuration: the first failure silences the others, which would fail alike.

    Attributes:
        blown: whether one has failed.
    """

    blown: bool = False


class GuardedTracker:
    """Passes everything on until the first failure, warns once, and is silent from then on.

    Args:
        make: opens the tracker; called at the first use, so that a failing start is caught too.
        ready: a tracker that is open already; `make` is not called then.
        fuse: shared with other trackers that are to be silent after a failure of this one.
    """

    def __init__(self, make: Callable[[], Tracker], *, ready: Tracker | None = None, fuse: Fuse | None = None) -> None:
        self._make = make
        self._tracker = ready
        self._fuse = fuse or Fuse()

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Record metrics of a step, unless the tracker has failed before."""
        self._attempt(lambda tracker: tracker.log(step, metrics))

    def artifact(
        self, made: TrackedArtifact, /, *, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]
    ) -> None:
        """Record what was made, unless the tracker has failed before."""
        self._attempt(lambda tracker: tracker.artifact(made, uses=uses, metadata=metadata))

    def finish(self) -> None:
        """Close the tracker if it was opened."""
        if self._tracker is not None:
            self._attempt(lambda tracker: tracker.finish())

    def _attempt(self, action: Callable[[Tracker], None]) -> None:
        if self._fuse.blown:
            return
        try:
            if self._tracker is None:
                self._tracker = self._make()
            action(self._tracker)
        except Exception as error:  # whatever a third-party logger throws must not cost the run
            self._fuse.blown = True
            said = " ".join(str(error).split())[:_SAID_CHARACTERS]
            _LOG.warning("tracker failed, training goes on without it: %s: %s", type(error).__name__, said)


class _LentTracker:
    """Passes everything on but the end."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Record metrics of a step."""
        self._tracker.log(step, metrics)

    def artifact(
        self, made: TrackedArtifact, /, *, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]
    ) -> None:
        """Record what was made."""
        self._tracker.artifact(made, uses=uses, metadata=metadata)

    def finish(self) -> None:
        """Do nothing: the owner closes it."""


def guarded(tracker: Tracker) -> Tracker:
    """Return a tracker that can fail without stopping anything."""
    if isinstance(tracker, (GuardedTracker, NoTracker)):
        return tracker
    return GuardedTracker(lambda: tracker, ready=tracker)


def lent(tracker: Tracker) -> Tracker:
    """Return the tracker for a part of the work that closes what it is given, such as `fit`; the owner closes it."""
    return tracker if isinstance(tracker, NoTracker) else _LentTracker(tracker)


def within(seconds: float, action: Callable[[], object]) -> None:
    """Run an action that may hang, and wait for it no longer than this.

    Raises:
        TimeoutError: it is not done in time; it goes on in a thread that does not keep the process alive.
        Exception: whatever the action raises.
    """
    raised: list[Exception] = []

    def work() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True, name="tracker")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]


__all__ = ["Fuse", "GuardedTracker", "NoTracker", "TrackedArtifact", "Tracker", "guarded", "lent", "within"]
