"""Turns the first SIGINT or SIGTERM into a request to stop after the current step. Does not stop anything itself."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager; `raise_if_asked` is called by the loop where it is safe to stop.

    A second signal acts at once, as if this were not here. Outside the main thread no handler can be set, and none is.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
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
        self.signal = number
        self._restore()

    def raise_if_asked(self) -> None:
        """Raise what the signal means.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, with code 143.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal == signal.SIGTERM:
            raise SystemExit(143)
