"""The divergences themselves, as functions of log-probabilities; the plug-in modules wrap them with options.

All take log-probabilities of shape [N, V] (draft with gradient, target without) and return [N]. Nothing here clamps the
draft, so no gradient is cut off: a draft far from its target still learns.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def forward_kl(draft_log_probs: "Tensor", target_log_probs: "Tensor") -> "Tensor":
    """KL(p_t || p_d) = sum_v p_t (log p_t - log p_d), shape [N]."""
    return (target_log_probs.exp() * (target_log_probs - draft_log_probs)).sum(-1)


def reverse_kl(draft_log_probs: "Tensor", target_log_probs: "Tensor") -> "Tensor":
    """KL(p_d || p_t) = sum_v p_d (log p_d - log p_t), shape [N]."""
    return (draft_log_probs.exp() * (draft_log_probs - target_log_probs)).sum(-1)


def jsd(draft_log_probs: "Tensor", target_log_probs: "Tensor", *, beta: float) -> "Tensor":
    """beta KL(p_t || m) + (1 - beta) KL(p_d || m) with m = beta p_t + (1 - beta) p_d, shape [N]; 0 < beta < 1."""
    mixture = (target_log_probs + math.log(beta)).logaddexp(draft_log_probs + math.log1p(-beta))
    from_target = (target_log_probs.exp() * (target_log_probs - mixture)).sum(-1)
    from_draft = (draft_log_probs.exp() * (draft_log_probs - mixture)).sum(-1)
    return beta * from_target + (1.0 - beta) * from_draft


def total_variation(draft_log_probs: "Tensor", target_log_probs: "Tensor") -> "Tensor":
    """TV = 1/2 sum_v |p_t - p_d|, shape [N]; one minus the acceptance probability."""
    return 0.5 * (target_log_probs.exp() - draft_log_probs.exp()).abs().sum(-1)


def log_acceptance(draft_log_probs: "Tensor", target_log_probs: "Tensor") -> "Tensor":
    """log sum_v min(p_t, p_d), shape [N], finite even where the sum itself underflows."""
    return draft_log_probs.minimum(target_log_probs).logsumexp(dim=-1)
