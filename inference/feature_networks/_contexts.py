"""What a draft has read of its requests, as a network extends and reads it; the context of one request."""

from typing import Protocol

import torch
from torch import Tensor

from inference.cache import RollbackLayer
from inference.feature_networks._layers import KeysValues
from inference.trees import Level


class DraftContext(Protocol):
    """Keys and values of the contexts of R requests, as a network extends and reads them.

    Attributes:
        last: what a network wanted to keep of the last position of each request besides, `[R, 1, D]`.
    """

    @property
    def last(self) -> Tensor: ...

    def coming(self, count: int, device: torch.device) -> Tensor:
        """Positions of the `count` tokens that are being read, int64 `[1, count]`."""
        ...

    def extend(self, context: KeysValues) -> None:
        """Append keys and values `[1, kv_heads, count, head_dim]` of the tokens that are being read."""
        ...

    def keep_last(self, states: Tensor) -> None:
        """Keep `last` of the states `[1, count, D]` of the tokens that are being read."""
        ...

    def lengths(self, device: torch.device) -> Tensor:
        """Context positions held of each request, int64 `[R]`."""
        ...

    def keys_values(self) -> KeysValues:
        """All that is held, `[R, kv_heads, L, head_dim]` by layer, L of the longest request."""
        ...

    def mask(self) -> Tensor | None:
        """Which of the L positions are a request's own, bool `[R, 1, 1, L]`; None where all are."""
        ...

    def lengthen(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Let a block see one more position of each request, `[R, kv_heads, 1, head_dim]`, in the first layer.

        Returns:
            As `keys_values` and `mask`, with what the block has added so far. Nothing of it is there any more when the
            next token is read or the next block begins.
        """
        ...


class TreeContext(DraftContext, Protocol):
    """A context behind which trees can be drafted."""

    def branch(self, level: Level, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Let the tokens of a level attend to the context, themselves and those on their way, in the first layer.

        Args:
            level: whose these are.
            queries: `[R, count, heads, head_dim]`.
            keys: `[R, count, kv_heads, head_dim]`; the anchor's lie in the context already.
            values: likewise.

        Returns:
            `[R, count, heads * head_dim]`.
        """
        ...


class DraftCache:
    """The context of one request, one growing buffer a layer; what a block adds is never part of it.

    Only verified tokens' features are written, so a rejection leaves nothing to take back.

    Attributes:
        last: see `DraftContext`.
        length: context positions held.
    """

    last: Tensor

    def __init__(self, num_layers: int) -> None:
        self.layers = [RollbackLayer() for _ in range(num_layers)]
        self.length = 0

    def coming(self, count: int, device: torch.device) -> Tensor:
        """See `DraftContext.coming`."""
        return torch.arange(self.length, self.length + count, device=device)[None]

    def extend(self, context: KeysValues) -> None:
        """See `DraftContext.extend`."""
        for layer, (keys, values) in zip(self.layers, context, strict=True):
            layer.rollback(self.length)
            layer.update(keys, values)
        self.length = self.layers[0].length

    def keep_last(self, states: Tensor) -> None:
        """See `DraftContext.keep_last`."""
        self.last = states[:, -1:]

    def lengths(self, device: torch.device) -> Tensor:
        """See `DraftContext.lengths`."""
        return torch.full((1,), self.length, device=device)

    def keys_values(self) -> KeysValues:
        """See `DraftContext.keys_values`."""
        found = []
        for layer in self.layers:
            layer.rollback(self.length)
            assert layer.keys is not None and layer.values is not None, "nothing was read yet"
            found.append((layer.keys, layer.values))
        return found

    def mask(self) -> None:
        """See `DraftContext.mask`."""
        return None

    def lengthen(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, None]:
        """See `DraftContext.lengthen`."""
        return (*self.layers[0].update(keys, values), None)

    def clear(self) -> None:
        """Forget everything; the buffers stay."""
        self.length = 0

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes() for layer in self.layers)
