"""Which tokens of a micro-batch a student learns from: those where it lags furthest behind a reference.

A student with little room should not spend it on tokens that even a draft trained like it gets wrong. A reference, a
draft of the same target trained before and frozen, tells which these are: its gap is what the student still has to win.

Formula: gap = KL(p_t || p_d) - KL(p_t || p_r) with the reference's distribution p_r, all at temperature 1; kept are the
ceil(share * n) tokens with the largest. Source: AdaSPEC (Hu et al. 2025, arXiv 2510.19779).
"""

import math

import torch
from torch import Tensor, nn

from distill.chunked import TargetLogits
from distill.objectives import _divergences
from distill.objectives._teacher import draft_log_probs, target_log_probs


@torch.no_grad()
def gaps(
    states: Tensor,  # shape: [N, D]
    reference_states: Tensor,  # shape: [N, R]
    *,
    head: nn.Module,
    reference_head: nn.Module,
    target_logits: TargetLogits,
    chunk_tokens: int,
) -> Tensor:
    """How much further the student is from the target than the reference, in nats, `[N]`.

    Args:
        states: last hidden states of the student, without a gradient.
        reference_states: those of the reference at the same positions.
        head: from the student's states to logits.
        reference_head: from the reference's.
        target_logits: gives the target's logits `[n, V]` for a slice of positions.
        chunk_tokens: positions whose V-wide rows exist at one time.
    """
    found = []
    for start in range(0, states.shape[0], chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, states.shape[0]))
        target = target_log_probs(target_logits(rows))
        mine = _divergences.forward_kl(draft_log_probs(head(states[rows])), target)
        found.append(mine - _divergences.forward_kl(draft_log_probs(reference_head(reference_states[rows])), target))
    return torch.cat(found)


def kept_count(count: int, share: float) -> int:
    """Tokens kept of `count`: ceil(share * count)."""
    # 0.07 * 100 is a little more than 7 in floating point.
    return count if share >= 1.0 else math.ceil(share * count - 1e-9)


def largest(gaps: Tensor, share: float) -> Tensor:
    """Places of the tokens kept, int64 `[kept_count]`, in order; of equal gaps `[N]` the earlier ones."""
    order = torch.sort(gaps, descending=True, stable=True).indices
    return order[: kept_count(gaps.shape[0], share)].sort().values
