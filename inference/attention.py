"""Grouped-query attention under a mask without copying keys and values, on a CPU.

transformers repeats keys and values for every query head as soon as there is a mask, because GPU kernels want it so;
torch's CPU kernel reads them where they lie and gives the same numbers. Nothing else changes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "sdpa_grouped"
# Options that change the products themselves; transformers' own function knows them, or refuses them.
_SPECIAL = ("position_bias", "softcap", "cache")


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
    if special or attention_mask is None or key.shape[1] == query.shape[1] or query.device.type != "cpu":
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return result
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2).contiguous(), None


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU that uses `sdpa` attend through `grouped_attention`; any other stays as it is."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
