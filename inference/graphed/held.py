"""Keys and values of requests in fixed places, all layers in one tensor.

What changes them are operators of their own: torch.compile would write every change into a copy of a whole buffer, and
copy that back, since buffers that share a tensor may not be told apart.

Letters in shapes: L layers, B places, C positions each, G key and value heads, d head dimension, R requests, W new
tokens of each.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it
    triton = None


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
    if states.is_cuda and triton is not None:
        _put_in_place(states, layer, keys, values, places)
        return
    for part, new in enumerate((keys, values)):
        states[part, layer].view(-1, *states.shape[4:]).index_copy_(0, places, new.transpose(1, 2).flatten(0, 1))


def _put_in_place(states: Tensor, layer: int, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """`_write` by one kernel, where torch launches one for keys, one for values and copies of what is transposed."""
    width, (kv_heads, dim) = keys.shape[2], states.shape[4:]
    if keys.stride(3) != 1 or values.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    _put[(places.shape[0],)](
        keys,
        values,
        states[0, layer],
        states[1, layer],
        places,
        width,
        *keys.stride()[:3],
        *values.stride()[:3],
        KV_HEADS=kv_heads,
        ALL=1 << (kv_heads - 1).bit_length(),
        DIM=dim,
        WIDE=1 << (dim - 1).bit_length(),
        num_warps=1,
    )


@torch.library.custom_op("dspark::keep_held", mutates_args=("states",))
def _keep(states: Tensor, places: Tensor, sources: Tensor) -> None:
    held = states.view(*states.shape[:2], -1, *states.shape[4:])
    held.index_copy_(2, places, held.index_select(2, sources))


for _operator in (_write, _keep):
    _operator.register_fake(lambda *_: None)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _put(  # type: ignore[no-untyped-def]
        new_keys,
        new_values,
        keys,
        values,
        places,
        width,
        key_request,
        key_head,
        key_token,
        value_request,
        value_head,
        value_token,
        KV_HEADS: tl.constexpr,
        ALL: tl.constexpr,
        DIM: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        request, token = row // width, row % width
        head, column = tl.arange(0, ALL)[:, None], tl.arange(0, WIDE)[None, :]
        is_there = (head < KV_HEADS) & (column < DIM)
        place = (tl.load(places + row) * KV_HEADS + head) * DIM + column
        key = new_keys + request * key_request + head * key_head + token * key_token + column
        value = new_values + request * value_request + head * value_head + token * value_token + column
        tl.store(keys + place, tl.load(key, mask=is_there), mask=is_there)
        tl.store(values + place, tl.load(value, mask=is_there), mask=is_there)
