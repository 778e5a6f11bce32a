"""Generalised Jensen-Shannon divergence: bounded, between forward and reverse KL.

Formula: beta KL(p_t || m) + (1 - beta) KL(p_d || m), m = beta p_t + (1 - beta) p_d. Divided by beta it tends to the
forward KL as beta -> 0; divided by 1 - beta it tends to the reverse KL as beta -> 1. Source: generalised knowledge
distillation (Agarwal et al. 2023, arXiv 2306.13649), studied for drafts in DistillSpec (arXiv 2310.08461). Its bound
keeps single surprising tokens from dominating a batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.objectives import Objective, _divergences
from distill.objectives._teacher import check_options, draft_log_probs, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class JSD:
    """Callable objective; see the module for the formula."""

    beta: float
    temperature: float
    target_top_k: int

    def __call__(self, draft_logits: "Tensor", target_logits: "Tensor", labels: "Tensor", /) -> "Tensor":
        """Return the loss of each position, shape [N]; labels are not used."""
        return _divergences.jsd(
            draft_log_probs(draft_logits, temperature=self.temperature),
            target_log_probs(target_logits, temperature=self.temperature, top_k=self.target_top_k),
            beta=self.beta,
        )


@dataclass
class Config:
    """Options of the Jensen-Shannon divergence.

    Attributes:
        kind: name of this plug-in.
        beta: share of the target in the mixture, strictly between 0 and 1 (0.5 = the symmetric divergence).
        temperature: both sides' logits are divided by it; no T^2 factor is applied.
        target_top_k: keep only this many most likely target tokens, renormalised (0 = whole vocabulary).
    """

    kind: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    target_top_k: int = 0

    def __post_init__(self) -> None:
        check_options(self.kind, temperature=self.temperature, target_top_k=self.target_top_k)
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"objective jsd: beta is {self.beta}: choose a number strictly between 0 and 1, "
                "or objective=forward_kl (the limit at 0) or objective=reverse_kl (the limit at 1)"
            )

    def build(self) -> Objective:
        """Return the objective."""
        return JSD(self.beta, self.temperature, self.target_top_k)
