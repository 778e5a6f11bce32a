"""Total variation: exactly the chance of a rejection.

Formula: TV = 1/2 sum_v |p_t - p_d| = 1 - sum_v min(p_t, p_d). Source: acceptance = 1 - TV in Leviathan et al. 2023
(arXiv 2211.17192); as a loss DistillSpec (arXiv 2310.08461). Minimising it maximises acceptance itself, but the
gradient with respect to logit v is p_d(v) (s_v - E_{p_d} s), s_v = 1[p_d(v) > p_t(v)]: it fades when draft and target
barely overlap, so a cold start wants a mix or the hybrid form of `lk`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.objectives import Objective, _divergences
from distill.objectives._teacher import check_options, draft_log_probs, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TotalVariation:
    """Callable objective; see the module for the formula."""

    temperature: float
    target_top_k: int

    def __call__(self, draft_logits: "Tensor", target_logits: "Tensor", labels: "Tensor", /) -> "Tensor":
        """Return the loss of each position, shape [N], between 0 and 1; labels are not used."""
        return _divergences.total_variation(
            draft_log_probs(draft_logits, temperature=self.temperature),
            target_log_probs(target_logits, temperature=self.temperature, top_k=self.target_top_k),
        )


@dataclass
class Config:
    """Options of the total variation.

    Attributes:
        kind: name of this plug-in.
        temperature: both sides' logits are divided by it.
        target_top_k: keep only this many most likely target tokens, renormalised (0 = whole vocabulary).
    """

    kind: str = "total_variation"
    temperature: float = 1.0
    target_top_k: int = 0

    def __post_init__(self) -> None:
        check_options(self.kind, temperature=self.temperature, target_top_k=self.target_top_k)

    def build(self) -> Objective:
        """Return the objective."""
        return TotalVariation(self.temperature, self.target_top_k)
