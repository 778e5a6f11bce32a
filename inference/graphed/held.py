"""Keys and values of requests in fixed places, all layers in one tensor.

What changes them are operators of their own: torch.compile would write every change into a copy of a whole buffer, and
copy that back, since buffers that share a tensor may not be told apart.

Letters in shapes: L layers, B places, C positions each, G key and value heads, d head dimension, R requests, W new
tokens of each.
"""

import torch
from torch import Tensor


class Held:
    """Buffers.

    Args:
        layers: L.
        batch: B.
        capacity: C.
        kv_heads: G.
        head_dim: d.
        dtype: of the states.
        device: where they lie.

    Attributes:
        states: `[2, L, B, C, G, d]`, keys and values.
    """

    def __init__(
        self,
        layers: int,
        *,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.states = torch.zeros(2, layers, batch, capacity, kv_heads, head_dim, dtype=dtype, device=device)

    def write(self, layer: int, keys: Tensor, values: Tensor, places: Tensor) -> None:
        """Put new tokens into a layer.

        Args:
            layer: which.
            keys: `[R, G, W, d]`.
            values: likewise.
            places: int64 `[R * W]`, of all `B * C` positions.
        """
        _write(self.states, layer, keys, values, places)

    def keep(self, places: Tensor, sources: Tensor) -> None:
        """Let positions hold what others of the same or other requests held before, in all layers.

        Args:
            places: int64 `[n]`, of all `B * C` positions.
            sources: int64 `[n]`, likewise.
        """
        _keep(self.states, places, sources)

    def move(self, source: int, place: int, *, length: int) -> None:
        """Let a request's first positions lie in another place too."""
        self.states[:, :, place, :length] = self.states[:, :, source, :length]

    def of(self, layer: int, *, shown: int) -> list[Tensor]:
        """Keys and values of a layer, `[B, shown, G, d]` each."""
        return [self.states[part, layer, :, :shown] for part in range(2)]

    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.states.nbytes


@torch.library.custom_op("dspark::write_held", mutates_args=("states",))
def _write(states: Tensor, layer: int, keys: Tensor, values: Tensor, places: Tensor) -> None:
    for part, new in enumerate((keys, values)):
        states[part, layer].view(-1, *states.shape[4:]).index_copy_(0, places, new.transpose(1, 2).flatten(0, 1))


@torch.library.custom_op("dspark::keep_held", mutates_args=("states",))
def _keep(states: Tensor, places: Tensor, sources: Tensor) -> None:
    held = states.view(*states.shape[:2], -1, *states.shape[4:])
    held.index_copy_(2, places, held.index_select(2, sources))


for _operator in (_write, _keep):
    _operator.register_fake(lambda *_: None)
