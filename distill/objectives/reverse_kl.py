"""Reverse KL: mode seeking, weighted by what the draft itself would say.

Formula: KL(p_d || p_t) = sum_v p_d (log p_d - log p_t). Source: MiniLLM (Gu et al. 2023, arXiv 2306.08543); for drafts
DistillSpec (arXiv 2310.08461). A small draft that cannot cover the whole target gives up the tail and keeps the
modes, and rejections come from tokens the draft proposes, which is where this loss looks. There is no top-k
truncation here: a token with no target mass would make the divergence infinite.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.objectives import Objective, _divergences
from distill.objectives._teacher import check_options, draft_log_probs, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ReverseKL:
    """Callable objective; see the module for the formula."""

    temperature: float

    def __call__(self, draft_logits: "Tensor", target_logits: "Tensor", labels: "Tensor", /) -> "Tensor":
        """Return the loss of each position, shape [N]; labels are not used."""
        return _divergences.reverse_kl(
            draft_log_probs(draft_logits, temperature=self.temperature),
            target_log_probs(target_logits, temperature=self.temperature),
        )


@dataclass
class Config:
    """Options of the reverse KL.

    Attributes:
        kind: name of this plug-in.
        temperature: both sides' logits are divided by it; no T^2 factor is applied.
    """

    kind: str = "reverse_kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_options(self.kind, temperature=self.temperature)

    def build(self) -> Objective:
        """Return the objective."""
        return ReverseKL(self.temperature)
