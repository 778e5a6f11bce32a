"""Turns the first SIGINT or SIGTERM into a request to stop after the current step. Does not stop anything itself."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager; `signal` is looked at by the loop where it is safe to stop.

    A second signal acts at once, as if this were not here; among several processes it does not, because whoever starts
    them may pass on what they have got already. Outside the main thread no handler can be set, and none is.

    Args:
        alone: whether this is the only process.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.signal: int | None = None
        self._alone = alone
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self._alone:
            self._restore()


def raise_for(number: int, *, step: int) -> None:
    """Raise what a signal means.

    Args:
        number: SIGINT or SIGTERM.
        step: steps that are saved.

    Raises:
        KeyboardInterrupt: for SIGINT.
        Stopped: for SIGTERM.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(step)


class Stopped(SystemExit):
    """SIGTERM came, and what was done is saved; exit code 143, as a shell names a process that it ended.

    Args:
        step: steps that are saved.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(128 + signal.SIGTERM)
