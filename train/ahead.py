"""Batches made by a thread while the step before them runs. Knows nothing of what a batch is.

A batch is a pure function of its step and micro-batch, so what was made ahead is what would have been made.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType

from train.batches import Batch

_Place = tuple[int, int]


class BatchesAhead(AbstractContextManager["BatchesAhead"]):
    """The batches of a function, each made ahead of its time as long as they are asked for in order.

    Args:
        batches: (step, micro-batch) to a batch.
        steps: of the whole run; nothing is made for later ones.
        accumulation: micro-batches of a step.
    """

    def __init__(self, batches: Callable[[int, int], Batch], *, steps: int, accumulation: int) -> None:
        self._batches, self._steps, self._accumulation = batches, steps, accumulation
        self._rank, self._size = 0, 1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: tuple[_Place, Future[Batch]] | None = None

    def deal(self, rank: int, size: int) -> None:
        """Make only the micro-batches ahead that are dealt to one process of several."""
        self._rank, self._size = rank, size

    def __call__(self, step: int, micro: int) -> Batch:
        """The batch of a place. What making it ahead raised is raised here."""
        place, coming = (step, micro), self._coming
        batch = coming[1].result() if coming is not None and coming[0] == place else self._batches(step, micro)
        later = micro + self._size
        following = (step, later) if later < self._accumulation else (step + 1, self._rank)
        made = following[0] < self._steps
        self._coming = (following, self._thread.submit(self._batches, *following)) if made else None
        return batch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the thread, and forget what it made."""
        self._thread.shutdown(cancel_futures=True)
        self._coming = None
