"""Attention of a few new tokens of each request to what its place holds: one kernel that reads no position in vain.

A general kernel is handed keys up to the longest request's end and a mask, as numbers, that says which of them count;
cuDNN's takes 12 microseconds so for the 129 tokens of a tree, in each of 30 layers on an H200 (docs/gpu.md). Here every
request's own length is read on the device, the mask is that of the new tokens among themselves alone, and the query
heads of a group share what is read.

Letters in shapes: R requests, W new tokens of each, L layers, B places, C positions a place holds, E tokens that may be
seen besides the context, H query heads, G key and value heads, d head dimension.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it
    triton = None

_WIDEST_HEAD = 256
_NARROWEST = 16  # products are of no fewer columns
# Powers of two are what a GPU has.
_LOG2_E = 1.4426950408889634
# Queries in one program: few, unless there are programs enough for a GPU's processors with many.
_FEW_ROWS, _MANY_ROWS, _ENOUGH_PROGRAMS = 16, 32, 128
# Keys looked at in one step: with few queries more than with many, and of wide heads fewer, so that those of two steps
# fit into what a GPU's processors share (64 KiB).
_KEYS, _KEYS_OF_FEW = 64, 128
_NUMBERS, _STEPS = 8192, 2


def can_attend(states: Tensor, *, head_dim: int) -> bool:
    """Whether the kernel is for such states: on a GPU, in 16 bits. In fp32 its products would be less exact than
    torch's."""
    fits = states.is_cuda and states.dtype in (torch.bfloat16, torch.float16) and head_dim <= _WIDEST_HEAD
    return triton is not None and fits


@torch.library.custom_op("dspark::attend_held", mutates_args=())
def attend_held(
    queries: Tensor,
    states: Tensor,
    layer: int,
    lengths: Tensor,
    rows: Tensor | None = None,
    among: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """Each new token attends to the context of its request, and to tokens that lie behind it.

    An operator of its own, so that torch.compile leaves the kernel as it is. Keys are gone through in steps with a
    running softmax (Dao et al. 2022, FlashAttention, algorithm 1).

    Args:
        queries: `[R, W, H, d]`, the numbers of a head one after another.
        states: `[2, L, B, C, G, d]`, keys and values of all layers, the new tokens' own among them; see
            `inference.graphed.held.Held`.
        layer: which of them is attended to.
        lengths: int64 `[R]`, positions of the context; all new tokens see these.
        rows: int64 `[R]`, the requests' places; None for the first R.
        among: bool `[W, E]`, which of the E tokens behind the context a new token sees; None where they are the new
            tokens themselves, one after another, and each sees those before it and itself.
        scale: of the products.

    Returns:
        `[R, W, H, d]`; zeros of a token that sees nothing.
    """
    count, width, heads, dim = queries.shape
    keys, values = states[0, layer], states[1, layer]
    kv_heads, groups = keys.shape[2], heads // keys.shape[2]
    mixed = torch.empty(count, width, heads, dim, dtype=queries.dtype, device=queries.device)
    is_many = -(-groups * width // _MANY_ROWS) * kv_heads * count >= _ENOUGH_PROGRAMS and groups * width > _FEW_ROWS
    block = _MANY_ROWS if is_many else _FEW_ROWS
    wide = max(_NARROWEST, 1 << (dim - 1).bit_length())
    grid = (-(-groups * width // block), kv_heads, count)
    _attend[grid](
        queries,
        keys,
        values,
        lengths,
        lengths if rows is None else rows,
        lengths if among is None else among,
        mixed,
        width,
        width if among is None else among.shape[1],
        0 if among is None else among.stride(0),
        *queries.stride()[:3],
        *keys.stride()[:3],
        *mixed.stride()[:3],
        SCALE=scale * _LOG2_E,
        IN_PLACE=rows is None,
        CHAIN=among is None,
        GROUPS=groups,
        DIM=dim,
        WIDE=wide,
        ROWS=block,
        KEYS=min(_KEYS if is_many else _KEYS_OF_FEW, _NUMBERS // wide),
        num_warps=4,
        num_stages=_STEPS,
    )
    return mixed


@attend_held.register_fake
def _(queries: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _attend(  # type: ignore[no-untyped-def]
        queries,
        keys,
        values,
        lengths,
        places,
        among,
        mixed,
        width,
        behind,
        among_row,
        query_request,
        query_token,
        query_head,
        key_place,
        key_token,
        key_head,
        mixed_request,
        mixed_token,
        mixed_head,
        SCALE: tl.constexpr,
        IN_PLACE: tl.constexpr,
        CHAIN: tl.constexpr,
        GROUPS: tl.constexpr,
        DIM: tl.constexpr,
        WIDE: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        part, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        place = request if IN_PLACE else tl.load(places + request)
        start = tl.load(lengths + request)
        row = part * ROWS + tl.arange(0, ROWS)
        token, own_head = row // GROUPS, head * GROUPS + row % GROUPS
        is_row = token < width
        column, step = tl.arange(0, WIDE), tl.arange(0, KEYS)
        is_column = column < DIM
        at = request * query_request + token * query_token + own_head * query_head
        query = tl.load(queries + at[:, None] + column, mask=is_row[:, None] & is_column, other=0.0)
        key_base = keys + place.to(tl.int64) * key_place + head * key_head + column
        value_base = values + place.to(tl.int64) * key_place + head * key_head + column
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDE], tl.float32)
        # The context, all of which every token sees; then, in steps of their own, the tokens behind it.
        for first in range(0, start, KEYS):
            position = first + step
            is_there = position < start
            key, value = _read(key_base, value_base, position, key_token, is_there, is_column)
            seen = is_there[None, :]
            most, total, sums = _taken_in(query, key, value, seen, SCALE, most, total, sums)
        # Of a chain, what the last token of these rows may see.
        end = tl.minimum((part * ROWS + ROWS - 1) // GROUPS + 1, width) if CHAIN else behind
        for first in range(0, end, KEYS):
            further = first + step
            is_there = further < end
            key, value = _read(key_base, value_base, start + further, key_token, is_there, is_column)
            if CHAIN:
                seen = (further[None, :] <= token[:, None]) & is_there[None, :]
            else:
                told = among + token[:, None] * among_row + further
                seen = tl.load(told, mask=is_row[:, None] & is_there[None, :], other=0) != 0
            most, total, sums = _taken_in(query, key, value, seen, SCALE, most, total, sums)
        shares = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        to = request * mixed_request + token * mixed_token + own_head * mixed_head
        tl.store(mixed + to[:, None] + column, shares.to(query.dtype), mask=is_row[:, None] & is_column)

    @triton.jit
    def _read(key_base, value_base, position, key_token, is_there, is_column):  # type: ignore[no-untyped-def]
        """Keys and values of some positions; zeros of those that are none."""
        offsets = position[:, None].to(tl.int64) * key_token
        mask = is_there[:, None] & is_column
        return tl.load(key_base + offsets, mask=mask, other=0.0), tl.load(value_base + offsets, mask=mask, other=0.0)

    @triton.jit  # type: ignore[untyped-decorator]
    def _taken_in(query, key, value, seen, SCALE: tl.constexpr, most, total, sums):  # type: ignore[no-untyped-def]
        """The largest product of each row so far, and sums of weights, and of values by weights, that go with it."""
        product = tl.where(seen, tl.dot(query, tl.trans(key)) * SCALE, float("-inf"))
        higher = tl.maximum(most, tl.max(product, 1))
        # Of a token that has seen nothing yet the difference would not be a number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(product - base[:, None])
        kept = tl.exp2(most - base)
        sums = sums * kept[:, None] + tl.dot(weight.to(value.dtype), value)
        return higher, total * kept + tl.sum(weight, 1), sums
