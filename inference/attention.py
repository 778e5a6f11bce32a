"""Our own `sdpa`: grouped-query attention without copied keys and values on a CPU, and masks that know of siblings.

transformers repeats keys and values for every query head as soon as there is a mask, because GPU kernels want it so;
torch's CPU kernel reads them where they lie and gives the same numbers.

A sibling stands beside a token of the chain in front of it (`inference.drafters.Proposal`). Whatever mask a family asks
for, causal or windowed, its row is that of the token it stands beside, with itself in that token's place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "sdpa_grouped"
# Options that change the products themselves; transformers' own function knows them, or refuses them.
_SPECIAL = ("position_bias", "softcap", "cache")
# Where other ways than torch's grouped kernel are faster on a CPU.
_FEW_QUERIES = 16
_MANY_REQUESTS = 4


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`[batch, n, heads, head_dim]` and None, as transformers' `sdpa`.

    Args:
        module: the attention layer.
        query: `[batch, heads, n, head_dim]`.
        key: `[batch, kv_heads, T, head_dim]`.
        value: likewise.
        attention_mask: `[batch, 1, n, T]`, or None; without one transformers copies nothing itself.
        dropout: of attention weights.
        scaling: of the products; None for `head_dim ** -0.5`.
        options: what else transformers hands to an attention function.
    """
    special = any(options.get(name) is not None for name in _SPECIAL)
    if attention_mask is None and not special and not dropout and query.device.type == "cpu" and query.shape[2] == 1:
        if query.dtype == torch.float32 or query.shape[1] == key.shape[1]:
            mixed = functional.scaled_dot_product_attention(
                query, key, value, scale=scaling, enable_gqa=query.shape[1] > key.shape[1]
            )
            return mixed.transpose(1, 2), None
    if not special and not dropout and query.device.type == "cpu" and query.shape[1] > key.shape[1]:
        batch, _, count, _ = query.shape
        if query.dtype in (torch.bfloat16, torch.float16):
            if count == 1 or (count <= _FEW_QUERIES and batch >= _MANY_REQUESTS and attention_mask is not None):
                return _by_rows(query, key, value, attention_mask, scaling), None
        elif 1 < count <= _FEW_QUERIES and batch >= _MANY_REQUESTS and attention_mask is not None:
            return _by_products(query, key, value, attention_mask, scaling), None
    if special or attention_mask is None or key.shape[1] == query.shape[1] or query.device.type != "cpu":
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return result
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2).contiguous(), None


def _by_rows(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None) -> Tensor:
    """`grouped_attention` with the queries of a group as further rows.

    For a single query in half precision torch's kernel is 2 to 6 times slower than so (docs/experiments.md).
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is not None and query.shape[2] > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    rows = query.reshape(query.shape[0], key.shape[1], groups * query.shape[2], query.shape[3])
    mixed = functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(query.shape).transpose(1, 2).contiguous()


def _by_products(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None) -> Tensor:
    """`grouped_attention` by two batched products: for several queries of many requests in full precision."""
    batch, heads, count, width = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * count, width)
    scores = torch.matmul(rows, key.transpose(2, 3)).mul_(width**-0.5 if scaling is None else scaling)
    seen = scores.unflatten(2, (groups, count))
    if attention_mask.dtype == torch.bool:
        seen.masked_fill_(~attention_mask[:, :, None], -torch.inf)
    else:
        seen.add_(attention_mask[:, :, None])
    mixed = torch.matmul(scores.softmax(-1), value)
    return mixed.reshape(query.shape).transpose(1, 2).contiguous()


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model that uses `sdpa` attend through `grouped_attention`; any other stays as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)


_SLOTS: ContextVar[tuple[int, ...]] = ContextVar("slots", default=())


@contextmanager
def masked_siblings(slots: Sequence[int]) -> Iterator[None]:
    """Passes inside the block end with one sibling for each of these places in the chain; see `CausalModel.logits`."""
    token = _SLOTS.set(tuple(slots))
    try:
        yield
    finally:
        _SLOTS.reset(token)


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the products of queries and keys: nothing where a key is seen, else minus infinity.

    As a mask of truth values it would be made into this again in every layer.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def current_siblings() -> tuple[int, ...]:
    """The places that `masked_siblings` was given for the pass that is being made."""
    return _SLOTS.get()


def sibling_mask(batch_size: int, q_length: int, kv_length: int, **options: Any) -> Tensor | None:
    """transformers' `sdpa_mask`, with the rows of siblings put right where there are any."""
    slots = _SLOTS.get()
    if slots:
        options["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, **options)
    if not slots or mask is None:
        return mask
    # The chain begins one after the anchor, and the cache comes before both.
    beside = torch.tensor(slots, device=mask.device) + 1
    first = q_length - len(slots)
    rows = mask[:, :, beside].clone()
    each, columns = torch.arange(len(slots), device=mask.device), kv_length - q_length
    rows[:, :, each, columns + beside] = False
    rows[:, :, each, columns + first + each] = True
    return torch.cat([mask[:, :, :first], rows], dim=2)


class Attending(Protocol):
    """Another way for a pass to attend; see `overridden`."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """As `grouped_attention`."""

    def mask(self, mask_function: Callable[..., Tensor], **options: Any) -> Tensor:
        """As transformers' `sdpa_mask`."""


_OVERRIDE: ContextVar[Attending | None] = ContextVar("override", default=None)


@contextmanager
def overridden(attending: Attending) -> Iterator[None]:
    """Passes inside the block, of models that use `GROUPED`, attend and mask in a way of their own."""
    token = _OVERRIDE.set(attending)
    try:
        yield
    finally:
        _OVERRIDE.reset(token)


def current_override() -> Attending | None:
    """How the pass that is being made attends, if in a way of its own."""
    return _OVERRIDE.get()


def _attention(*states: Any, **options: Any) -> tuple[Tensor, None]:
    override = _OVERRIDE.get()
    return grouped_attention(*states, **options) if override is None else override.attend(*states, **options)


def _mask(**options: Any) -> Tensor | None:
    override = _OVERRIDE.get()
    if override is not None:
        return override.mask(**options)
    mask, dtype = sibling_mask(**options), options.get("dtype")
    if mask is None or dtype is None or mask.device.type != "cpu":
        return mask
    # Of truth values torch's kernel makes this itself, in every layer: 0.3 of 20 ms of a pass of four tokens.
    return added(mask, dtype)


AttentionInterface.register(GROUPED, _attention)
AttentionMaskInterface.register(GROUPED, _mask)
