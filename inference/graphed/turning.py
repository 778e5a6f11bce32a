"""Queries and keys turned by their positions, and keys and values put where they belong: one kernel between the product
that makes them and attention, where torch would launch three.

Letters in shapes: N new tokens, H query heads, G key and value heads, d head dimension, L layers, B places, C positions
each.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it
    triton = None


@torch.library.custom_op("dspark::turn_held", mutates_args=("states",))
def turn_held(
    rows: Tensor, cosine: Tensor, sine: Tensor, states: Tensor, layer: int, places: Tensor, *, heads: int
) -> Tensor:
    """Turn queries and keys, and keep keys and values.

    An operator of its own, so that torch.compile leaves the kernel as it is. Its arithmetic is fp32, rounded once.

    Args:
        rows: `[N, H + 2 * G, d]`, queries, keys and values of each token, one after another.
        cosine: `[N, d]` of each token's position.
        sine: `[N, d]`, the first half negated; see `inference.lean.rolled_tables`.
        states: `[2, L, B, C, G, d]`, see `inference.graphed.held.Held`.
        layer: in which the tokens are kept.
        places: int64 `[N]`, where, of all `B * C` positions.
        heads: H.

    Returns:
        The queries `[N, H, d]`.
    """
    count, both, dim = rows.shape
    keys, values = states[0, layer], states[1, layer]
    queries = torch.empty(count, heads, dim, dtype=rows.dtype, device=rows.device)
    _turn[(count,)](
        rows,
        cosine,
        sine,
        keys,
        values,
        places,
        queries,
        *rows.stride()[:2],
        cosine.stride(0),
        HEADS=heads,
        KV_HEADS=keys.shape[2],
        ALL=1 << (both - 1).bit_length(),
        DIM=dim,
        WIDE=1 << (dim - 1).bit_length(),
        num_warps=4,
    )
    return queries


@turn_held.register_fake
def _(rows: Tensor, *_: object, heads: int) -> Tensor:
    return torch.empty(rows.shape[0], heads, rows.shape[2], dtype=rows.dtype, device=rows.device)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _turn(  # type: ignore[no-untyped-def]
        rows,
        cosine,
        sine,
        keys,
        values,
        places,
        queries,
        row_token,
        row_head,
        table_token,
        HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        ALL: tl.constexpr,
        DIM: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        head, column = tl.arange(0, ALL)[:, None], tl.arange(0, WIDE)[None, :]
        is_column = column < DIM
        is_there = (head < HEADS + 2 * KV_HEADS) & is_column
        at = rows + token * row_token + head * row_head
        given = tl.load(at + column, mask=is_there, other=0.0)
        rolled = tl.load(at + (column + DIM - DIM // 2) % DIM, mask=is_there, other=0.0)
        turns = tl.load(cosine + token * table_token + column, mask=is_column, other=0.0).to(tl.float32)
        crosses = tl.load(sine + token * table_token + column, mask=is_column, other=0.0).to(tl.float32)
        turned = (given.to(tl.float32) * turns + rolled.to(tl.float32) * crosses).to(given.dtype)
        tl.store(queries + (token * HEADS + head) * DIM + column, turned, mask=is_column & (head < HEADS))
        kept = tl.load(places + token) * KV_HEADS
        key, value = head - HEADS, head - HEADS - KV_HEADS
        tl.store(keys + (kept + key) * DIM + column, turned, mask=is_column & (key >= 0) & (key < KV_HEADS))
        tl.store(values + (kept + value) * DIM + column, given, mask=is_column & (value >= 0) & (value < KV_HEADS))
