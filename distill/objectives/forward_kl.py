"""Forward KL, the usual distillation loss. Not the label loss: it uses the target's whole distribution.

Formula: KL(p_t || p_d) = sum_v p_t (log p_t - log p_d). Source: Hinton et al. 2015 (arXiv 1503.02531); for drafts
DistillSpec (Zhou et al. 2023, arXiv 2310.08461). It covers all of the target's mass, and by Pinsker's inequality
TV <= sqrt(KL / 2), so driving it to zero drives acceptance to one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.objectives import Objective, _divergences
from distill.objectives._teacher import check_options, draft_log_probs, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ForwardKL:
    """Callable objective; see the module for the formula."""

    temperature: float
    target_top_k: int

    def __call__(self, draft_logits: "Tensor", target_logits: "Tensor", labels: "Tensor", /) -> "Tensor":
        """Return the loss of each position, shape [N]; labels are not used."""
        return _divergences.forward_kl(
            draft_log_probs(draft_logits, temperature=self.temperature),
            target_log_probs(target_logits, temperature=self.temperature, top_k=self.target_top_k),
        )


@dataclass
class Config:
    """Options of the forward KL.

    Attributes:
        kind: name of this plug-in.
        temperature: both sides' logits are divided by it; no T^2 factor is applied.
        target_top_k: keep only this many most likely target tokens, renormalised (0 = whole vocabulary).
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    target_top_k: int = 0

    def __post_init__(self) -> None:
        check_options(self.kind, temperature=self.temperature, target_top_k=self.target_top_k)

    def build(self) -> Objective:
        """Return the objective."""
        return ForwardKL(self.temperature, self.target_top_k)
