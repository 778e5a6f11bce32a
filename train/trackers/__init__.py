"""Where metrics go besides the log, one module a choice. A tracker can fail; training never stops for it."""

import logging
from collections.abc import Callable
from typing import Protocol

_LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives metrics while training runs."""

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Record metrics of a step, counted from 1."""
        ...

    def finish(self) -> None:
        """Flush and close; called once, also when training fails."""
        ...


class GuardedTracker:
    """Passes everything on until the first failure, warns once, and is silent from then on.

    Args:
        make: opens the tracker; called at the first use, so that a failing start is caught too.
        ready: a tracker that is open already; `make` is not called then.
    """

    def __init__(self, make: Callable[[], Tracker], *, ready: Tracker | None = None) -> None:
        self._make = make
        self._tracker = ready
        self._failed = False

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Record metrics of a step, unless the tracker has failed before."""
        self._attempt(lambda tracker: tracker.log(step, metrics))

    def finish(self) -> None:
        """Close the tracker if it was opened."""
        if self._tracker is not None:
            self._attempt(lambda tracker: tracker.finish())

    def _attempt(self, action: Callable[[Tracker], None]) -> None:
        if self._failed:
            return
        try:
            if self._tracker is None:
                self._tracker = self._make()
            action(self._tracker)
        except Exception as error:  # whatever a third-party logger throws must not cost the run
            self._failed = True
            _LOG.warning("tracker failed, training goes on without it: %s: %s", type(error).__name__, error)


def guarded(tracker: Tracker) -> GuardedTracker:
    """Return a tracker that can fail without stopping anything."""
    return tracker if isinstance(tracker, GuardedTracker) else GuardedTracker(lambda: tracker, ready=tracker)


__all__ = ["GuardedTracker", "Tracker", "guarded"]
