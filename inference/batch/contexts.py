"""The contexts of many requests for one feature draft: `DraftContext` over slots that the engine's own slots mirror.

What a block adds while it is drafted lies behind its request's context and is rolled back; see `inference.batch.cache`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from inference.batch.cache import Placement, SlotCache
from inference.feature_networks._layers import KeysValues


class DraftSlots:
    """Keys and values of what each request's draft has read; `reading` and `drafting` say which requests take part.

    Args:
        num_layers: whose keys and values are kept. A draft that lengthens its context has one.
        max_slots: most requests at once.
        max_tokens: most positions of a request, what a block adds included.
    """

    def __init__(self, num_layers: int, *, max_slots: int, max_tokens: int) -> None:
        self._cache = SlotCache(num_layers, max_slots=max_slots, max_tokens=max_tokens)
        self._max_slots = max_slots
        self._last = torch.empty(0)
        self._active: tuple[int, ...] = ()
        self._placement: Placement | None = None

    @property
    def held(self) -> list[int]:
        """Positions held of each request, by slot."""
        return self._cache.lengths

    def join(self) -> int:
        """A slot for a new request, the next one."""
        return self._cache.join()

    @torch.inference_mode()
    def leave(self, slot: int) -> None:
        """Free a slot; the last one's request moves into it."""
        moved = self._cache.leave(slot)
        if moved is not None and self._last.shape[0]:
            self._last[slot] = self._last[moved]

    @contextmanager
    def reading(self, slots: Sequence[int], widths: Sequence[int], device: torch.device) -> Iterator[None]:
        """A network reads, inside the block, so many tokens for each of these requests, one after another."""
        self._active = tuple(slots)
        with self._cache.placed(widths, active=slots, device=device) as placement:
            self._placement = placement
            try:
                yield
            finally:
                self._placement = None

    @contextmanager
    def drafting(self, slots: Sequence[int]) -> Iterator[None]:
        """A network drafts, inside the block, for these requests; what it adds is forgotten at the end."""
        self._active = tuple(slots)
        lengths = self._cache.lengths
        try:
            yield
        finally:
            self._cache.rollback(lengths)

    # `DraftContext`

    @property
    def last(self) -> Tensor:
        """See `DraftContext`."""
        if self._active == tuple(range(len(self._active))):
            return self._last[: len(self._active), None]
        return self._last[list(self._active), None]

    def coming(self, count: int, device: torch.device) -> Tensor:
        """See `DraftContext.coming`."""
        assert self._placement is not None and self._placement.columns.shape[0] == count, "nothing is being read"
        return self._placement.columns[None]

    def extend(self, context: KeysValues) -> None:
        """See `DraftContext.extend`."""
        for layer, (keys, values) in zip(self._cache.slot_layers, context, strict=True):
            layer.update(keys, values)

    def keep_last(self, states: Tensor) -> None:
        """See `DraftContext.keep_last`."""
        assert self._placement is not None, "nothing is being read"
        if self._last.shape[-1] != states.shape[-1]:
            self._last = states.new_zeros((self._max_slots, states.shape[-1]))
        ends = torch.tensor(self._placement.widths, device=states.device).cumsum(0) - 1
        self._last[list(self._active)] = states[0, ends]

    def lengths(self, device: torch.device) -> Tensor:
        """See `DraftContext.lengths`."""
        return torch.tensor(self._lengths(), device=device)

    def keys_values(self) -> KeysValues:
        """See `DraftContext.keys_values`."""
        return self._cache.read(self._active)

    def mask(self) -> Tensor | None:
        """See `DraftContext.mask`."""
        lengths = self._lengths()
        longest = max(lengths)
        if min(lengths) == longest:
            return None
        device = self._cache.slot_layers[0].device
        columns = torch.arange(longest, device=device)
        return (columns < torch.tensor(lengths, device=device)[:, None])[:, None, None]

    def lengthen(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `DraftContext.lengthen`."""
        layer, count = self._cache.slot_layers[0], len(self._active)
        with self._cache.placed([1] * count, active=self._active, device=keys.device):
            # Requests become the tokens of one row: `[1, kv_heads, R, head_dim]`.
            seen = layer.update(keys.permute(2, 1, 0, 3), values.permute(2, 1, 0, 3))
        return (*seen, self.mask())

    def nbytes(self) -> int:
        """Bytes held."""
        return self._cache.nbytes() + self._last.nbytes

    def _lengths(self) -> list[int]:
        held = self._cache.lengths
        return [held[slot] for slot in self._active]
