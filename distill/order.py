"""In which order conversations are learned from: an endless stream of places, cut into micro-batches.

A pure function of seed and position, so that where a training is in its data is the step alone, and a resumed run, or
one of several processes, asks for what it wants in any order.
"""

import functools

import numpy as np
import numpy.typing as npt
import torch

Places = npt.NDArray[np.int64]


class Order:
    """Places of conversations in an endless stream: every one once an epoch, in another order each epoch.

    Conversations of one micro-batch are padded to its longest. So an epoch's permutation is cut into windows of
    `window` micro-batches, a window is sorted by length and cut into micro-batches, and these are shuffled: neighbours
    are of similar length, and the long ones still come at any time. Where the number of conversations is no multiple of
    a micro-batch, the one that lies across the end of an epoch is left as drawn.

    Args:
        lengths: tokens of each conversation, int `[n]`.
        size: conversations of a micro-batch.
        window: micro-batches sorted together; 0 sorts nothing.
        seed: fixes the order.
    """

    def __init__(self, lengths: Places, *, size: int, window: int, seed: int) -> None:
        self._lengths, self._size, self._window, self._seed = lengths, size, window, seed
        # A micro-batch may lie across the end of an epoch.
        self._epoch = functools.lru_cache(maxsize=2)(self._drawn)

    def micro_batch(self, index: int) -> list[int]:
        """Places of the conversations of the stream's micro-batch `index`."""
        start = index * self._size
        return [self._place(position) for position in range(start, start + self._size)]

    def _place(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._lengths))
        return int(self._epoch(epoch)[offset])

    def _drawn(self, epoch: int) -> Places:
        """The order of one epoch, int64 `[n]`."""
        count, size = len(self._lengths), self._size
        generator = torch.Generator().manual_seed(self._seed * 100_003 + epoch)
        order: Places = torch.randperm(count, generator=generator).numpy()
        first = -epoch * count % size  # these complete the micro-batch begun in the epoch before
        whole = max(0, count - first) // size
        if self._window == 0:
            return order
        for start in range(0, whole, self._window):
            end = min(start + self._window, whole)
            rows = slice(first + start * size, first + end * size)
            by_length = order[rows][np.argsort(self._lengths[order[rows]], kind="stable")]
            shuffled = torch.randperm(end - start, generator=generator).numpy()
            order[rows] = by_length.reshape(-1, size)[shuffled].reshape(-1)
        return order
