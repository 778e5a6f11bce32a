"""Caches whose other heads lie in other processes: what is done to one between two passes is noted, for the mirrors."""

from collections.abc import Sequence
from typing import Any

import torch

from inference.batch.cache import SlotCache
from inference.cache import RollbackCache


class Journal:
    """What was done to a cache since its last pass, in the form of an announcement."""

    def __init__(self, number: int, *, slots: list[int] | None = None) -> None:
        self.number, self._slots = number, slots
        self._edits: list[list[Any]] = []

    def note(self, name: str, *given: Any) -> None:
        self._edits.append([name, *given])

    def take(self) -> dict[str, Any]:
        edits, self._edits = self._edits, []
        return {"number": self.number, "slots": self._slots, "edits": edits}


class MirroredCache(RollbackCache):
    """This process's heads of a cache whose other heads lie in other processes."""

    def __init__(self, num_layers: int, journal: Journal, *, size: int) -> None:
        super().__init__(num_layers)
        self.journal, self._size = journal, size

    def rollback(self, length: int) -> None:
        """See `RollbackCache.rollback`."""
        super().rollback(length)
        self.journal.note("rollback", length)

    def move(self, source: int, destination: int) -> None:
        """See `RollbackCache.move`."""
        super().move(source, destination)
        self.journal.note("move", source, destination)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See `RollbackCache.batch_select_indices`."""
        super().batch_select_indices(indices)
        self.journal.note("batch_select_indices", indices.tolist())

    def nbytes(self) -> int:
        """Bytes held by all buffers of all processes."""
        return self._size * super().nbytes()


class MirroredSlots(SlotCache):
    """This process's heads of a slot cache whose other heads lie in other processes."""

    def __init__(self, num_layers: int, journal: Journal, *, size: int, max_slots: int, max_tokens: int) -> None:
        super().__init__(num_layers, max_slots=max_slots, max_tokens=max_tokens)
        self.journal, self._size = journal, size

    def join(self) -> int:
        """See `SlotCache.join`."""
        slot = super().join()
        self.journal.note("join")
        return slot

    def fork(self, source: int, length: int) -> int:
        """See `SlotCache.fork`."""
        slot = super().fork(source, length)
        self.journal.note("fork", source, length)
        return slot

    def leave(self, slot: int) -> int | None:
        """See `SlotCache.leave`."""
        moved = super().leave(slot)
        self.journal.note("leave", slot)
        return moved

    def rollback(self, lengths: Sequence[int]) -> None:
        """See `SlotCache.rollback`."""
        super().rollback(lengths)
        self.journal.note("rollback", [*lengths])

    def move(self, slots: Sequence[int], sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `SlotCache.move`."""
        super().move(slots, sources, destinations)
        self.journal.note("move", [*slots], [*sources], [*destinations])

    def nbytes(self) -> int:
        """Bytes held by all buffers of all processes."""
        return self._size * super().nbytes()
