"""Cross-entropy on the tokens the target wrote. Needs no target logits: the cheapest and the weakest teacher.

Formula: -log p_d(label). On the target's own samples its expectation is the forward KL plus the target's entropy,
with more noise. Source: sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from distill.objectives import Objective
from distill.objectives._teacher import draft_log_probs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """Callable objective; see the module for the formula."""

    reads_labels: ClassVar[bool] = True

    def __call__(self, draft_logits: "Tensor", target_logits: "Tensor", labels: "Tensor", /) -> "Tensor":
        """Return the loss of each position, shape [N]; target logits are not used."""
        return -draft_log_probs(draft_logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@dataclass
class Config:
    """Cross-entropy has no options.

    Attributes:
        kind: name of this plug-in.
    """

    kind: str = "cross_entropy"

    def build(self) -> Objective:
        """Return the objective."""
        return CrossEntropy()
