"""What a draft is trained to minimise, one module a choice; not the batching, the chunking or the optimiser.

Every objective maps draft logits, target logits and labels of N positions to N losses and leaves weighting and
averaging to the caller. Names say whose distribution is meant (`target_*`, `draft_*`), because papers and code bases
use bare p and q in opposite senses. In formulas p_t is the target's distribution and p_d the draft's.

Example: `Config(beta=0.3).build()(draft_logits, target_logits, labels)` with `Config` of `distill.objectives.jsd`.
"""

from typing import TYPE_CHECKING, Protocol

from distill.objectives._teacher import loss_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Objective(Protocol):
    """A loss for every position; lower means the draft is closer to the target."""

    def __call__(
        self,
        draft_logits: "Tensor",  # shape: [N, V], carries the gradient
        target_logits: "Tensor",  # shape: [N, V], never differentiated
        labels: "Tensor",  # shape: [N], int64: the token that was really written at each position
        /,
    ) -> "Tensor":
        """Return the loss of each position, shape [N], fp32 (fp64 for fp64 logits)."""
        ...


def reads_labels(objective: Objective) -> bool:
    """Whether an objective learns from the token that was written, and so only where the target wrote it itself."""
    return bool(getattr(objective, "reads_labels", False))


def acceptance(
    draft_logits: "Tensor",  # shape: [N, V]
    target_logits: "Tensor",  # shape: [N, V]
) -> "Tensor":
    """Chance that a token sampled from the draft is accepted: sum_v min(p_t(v), p_d(v)) = 1 - TV(p_t, p_d).

    Speculative sampling accepts with exactly this probability at temperature 1 (Leviathan et al. 2023, arXiv
    2211.17192).

    Returns:
        Shape [N], fp32 (fp64 for fp64 logits), without a gradient.
    """
    draft_probs, target_probs = (
        logits.detach().softmax(dim=-1, dtype=loss_dtype(logits)) for logits in (draft_logits, target_logits)
    )
    return draft_probs.minimum(target_probs).sum(-1)


__all__ = ["Objective", "acceptance", "reads_labels"]
