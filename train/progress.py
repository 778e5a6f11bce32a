"""Shows how far training is: a bar on a terminal, at most one log line a second elsewhere. Records nothing."""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

_LOG = logging.getLogger(__name__)


class Progress:
    """Context manager that reports steps.

    Args:
        total: steps of the whole run.
        done: steps made before, when resuming.
        terminal: draw a bar; by default whether stderr is a terminal.
        shown: whether this process says anything.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        terminal: bool | None = None,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._first = total, done, done
        self._clock = clock
        self._started = clock()
        self._last_line = -float("inf")
        self._shown = shown
        self._bar: Any = _bar() if shown and (sys.stderr.isatty() if terminal is None else terminal) else None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._total, completed=self._done, metrics="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, *, loss: float, lr: float) -> None:
        """Report that `step` steps are complete."""
        self._done = step
        now = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=f"loss {loss:.4f} lr {lr:.2e}")
        elif self._shown and (now - self._last_line >= 1.0 or step == self._total):
            self._last_line = now
            pace = (now - self._started) / max(1, step - self._first)
            left = pace * (self._total - step)
            _LOG.info(
                "step %d/%d loss %.4f lr %.2e, %.2f s a step, %.0f s left", step, self._total, loss, lr, pace, left
            )


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=Console(stderr=True),
    )
