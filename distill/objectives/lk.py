"""LK losses: direct optimisation of the acceptance a = sum_v min(p_t, p_d). Two forms of one idea.

alpha:  -log a. Its gradient is that of the total variation divided by a, so it does not fade when the two barely
        overlap, and for a one-hot target it is the cross-entropy.
hybrid: lambda KL(p_t || p_d) + (1 - lambda) TV with lambda = exp(-eta stop_gradient(a)), taken for every position by
        itself: far from the target nearly the KL, which is safe for a cold start, and near it nearly the TV.

Source: LK losses (arXiv 2602.23881). Some code takes lambda from the batch mean of a: that is another objective.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.objectives import Objective, _divergences
from distill.objectives._teacher import check_options, draft_log_probs, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("alpha", "hybrid")


@dataclass(frozen=True)
class LK:
    """Callable objective; see the module for the formulas."""

    mode: str
    eta: float
    temperature: float
    target_top_k: int

    def __call__(self, draft_logits: "Tensor", target_logits: "Tensor", labels: "Tensor", /) -> "Tensor":
        """Return the loss of each position, shape [N]; labels are not used."""
        draft = draft_log_probs(draft_logits, temperature=self.temperature)
        target = target_log_probs(target_logits, temperature=self.temperature, top_k=self.target_top_k)
        if self.mode == "alpha":
            return -_divergences.log_acceptance(draft, target)
        variation = _divergences.total_variation(draft, target)
        share = (-self.eta * (1.0 - variation.detach())).exp()  # shape: [N], lambda
        return share * _divergences.forward_kl(draft, target) + (1.0 - share) * variation


@dataclass
class Config:
    """Options of the LK losses.

    Attributes:
        kind: name of this plug-in.
        mode: "alpha" or "hybrid".
        eta: how fast the hybrid moves from KL to TV as acceptance grows; not used by "alpha".
        temperature: both sides' logits are divided by it.
        target_top_k: keep only this many most likely target tokens, renormalised (0 = whole vocabulary).
    """

    kind: str = "lk"
    mode: str = "hybrid"
    eta: float = 3.0
    temperature: float = 1.0
    target_top_k: int = 0

    def __post_init__(self) -> None:
        check_options(self.kind, temperature=self.temperature, target_top_k=self.target_top_k)
        if self.mode not in MODES:
            raise ValueError(f"objective lk: mode is {self.mode!r}: choose one of {', '.join(MODES)}")
        if not self.eta >= 0.0:
            raise ValueError(f"objective lk: eta is {self.eta}: choose a number of at least 0 (3 in the paper)")

    def build(self) -> Objective:
        """Return the objective."""
        return LK(self.mode, self.eta, self.temperature, self.target_top_k)
