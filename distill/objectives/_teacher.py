"""Log-probabilities of both sides, in the precision a loss needs. Not an objective: objectives share it.

The target may be sharpened or flattened (temperature) and cut to its most likely tokens (top-k). Tokens the target
excludes get a very large negative, finite log-probability instead of -inf, so that `0 * log 0` is 0 in every formula
and no gradient has to be patched afterwards.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def loss_dtype(logits: "Tensor") -> "torch.dtype":
    """Return the precision losses are computed in: fp64 for fp64 logits, else fp32."""
    import torch

    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def draft_log_probs(
    draft_logits: "Tensor",  # shape: [N, V]
    *,
    temperature: float = 1.0,
) -> "Tensor":
    """Return log softmax(draft_logits / temperature), shape [N, V], fp32 (fp64 for fp64 logits), with its gradient."""
    logits = draft_logits.to(loss_dtype(draft_logits))
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(dim=-1)


def target_log_probs(
    target_logits: "Tensor",  # shape: [N, V]
    *,
    temperature: float = 1.0,
    top_k: int = 0,
) -> "Tensor":
    """Return the target's log-probabilities, shape [N, V], fp32 (fp64 for fp64 logits), without a gradient.

    Args:
        target_logits: raw logits of the target.
        temperature: the logits are divided by it first.
        top_k: keep only this many most likely tokens and renormalise; 0 keeps the whole vocabulary.
    """
    import torch

    logits = target_logits.detach().to(loss_dtype(target_logits))
    if temperature != 1.0:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter_(-1, kept.indices, kept.values)
    return torch.log_softmax(logits, dim=-1).clamp_(min=torch.finfo(logits.dtype).min / 4)


def check_options(kind: str, *, temperature: float = 1.0, target_top_k: int = 0) -> None:
    """Validate the options objectives have in common.

    Raises:
        ValueError: temperature not positive and finite, or a negative top-k.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"objective {kind}: temperature is {temperature}: choose a finite number above 0 (1 = as is)")
    if target_top_k < 0:
        raise ValueError(
            f"objective {kind}: target_top_k is {target_top_k}: choose 0 (whole vocabulary) or a number of tokens"
        )
