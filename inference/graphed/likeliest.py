"""The likeliest tokens of rows of logits: torch's own selection, or on a GPU one kernel that reads a row once.

torch's selection goes over a row several times with one block: of 8,192 tokens 30 microseconds for each level of a tree
on an H200, a tenth of a round (docs/gpu.md). Here a row is held in registers and its largest is taken out k times.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it
    triton = None

# Rows that registers hold, and so many of the largest as are worth taking out one by one.
_LONGEST_ROW = 16384
_MOST = 16


def likeliest(rows: Tensor, count: int) -> Tensor:
    """Places of the largest values, the largest first; of equals any.

    Args:
        rows: `[..., V]`, all of them numbers.
        count: k, at most V.

    Returns:
        int64 `[..., k]`, all different within a row.
    """
    if count == 1:
        return rows.argmax(-1, keepdim=True)
    width = rows.shape[-1]
    if triton is None or not rows.is_cuda or width > _LONGEST_ROW or count > _MOST:
        return rows.topk(count, dim=-1).indices
    rows = rows.contiguous()
    found = torch.empty((*rows.shape[:-1], count), dtype=torch.long, device=rows.device)
    block = 1 << (width - 1).bit_length()
    _taken_out[(rows.numel() // width,)](rows, found, width, COUNT=count, BLOCK=block, num_warps=8)
    return found


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _taken_out(rows, found, width, COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        # Below minus infinity there is nothing, so that what is taken out must not be taken again by its place.
        values = tl.load(rows + row * width + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        values = tl.where(columns < width, tl.maximum(values, -3.0e38), float("-inf"))
        for place in tl.static_range(COUNT):
            largest = tl.argmax(values, axis=0)
            tl.store(found + row * COUNT + place, largest.to(tl.int64))
            values = tl.where(columns == largest, float("-inf"), values)
