"""A convex mix of other objectives, each found by its kind. Not a schedule: the weights are fixed for the whole run.

Formula: sum_i w_i L_i, w_i >= 0, sum_i w_i = 1. The default, 0.1 cross-entropy and 0.9 total variation, follows the
balance of the DSpark recipe (Cheng et al. 2026), which writes the second term as the L1 distance, that is twice the
total variation.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill.objectives import Objective, reads_labels
from inference.plugins import plugin

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """Callable objective: the weighted sum of its parts."""

    parts: tuple[tuple[float, Objective], ...]

    @property
    def reads_labels(self) -> bool:
        """Whether any part does."""
        return any(reads_labels(objective) for _, objective in self.parts)

    def __call__(self, draft_logits: "Tensor", target_logits: "Tensor", labels: "Tensor", /) -> "Tensor":
        """Return the loss of each position, shape [N]."""
        import torch

        losses = [weight * objective(draft_logits, target_logits, labels) for weight, objective in self.parts]
        return torch.stack(losses).sum(0)


def _default_weights() -> dict[str, float]:
    return {"cross_entropy": 0.1, "total_variation": 0.9}


@dataclass
class Config:
    """What is mixed and how much of each.

    Attributes:
        kind: name of this plug-in.
        weights: weight by kind of objective; they sum to 1, and a weight of 0 leaves a kind out.
        options: options by kind, for kinds that have them, such as {"jsd": {"beta": 0.3}}.
    """

    kind: str = "mix"
    weights: dict[str, float] = field(default_factory=_default_weights)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "mix" in self.weights:
            raise ValueError("objective mix: weights name 'mix' itself: write the inner weights out instead")
        negative = [kind for kind, weight in self.weights.items() if not weight >= 0.0]
        if negative:
            raise ValueError(f"objective mix: weight of {negative[0]} is {self.weights[negative[0]]}: choose 0 or more")
        total = math.fsum(self.weights.values())
        if not math.isclose(total, 1.0, rel_tol=0.0, abs_tol=1e-6):
            raise ValueError(
                f"objective mix: weights {dict(self.weights)} sum to {total:g}: make it 1 (0 leaves a kind out)"
            )
        stray = sorted(set(self.options) - {kind for kind, weight in self.weights.items() if weight > 0.0})
        if stray:
            raise ValueError(
                f"objective mix: options for {stray[0]}, which is not in the mix: give it a weight or drop it"
            )
        self._parts()

    def _parts(self) -> tuple[tuple[float, Objective], ...]:
        """Build every part, so that an unknown kind or option is found before anything is trained."""
        parts: list[tuple[float, Objective]] = []
        for kind in sorted(kind for kind, weight in self.weights.items() if weight > 0.0):
            module = plugin("distill.objectives", kind)
            try:
                parts.append((self.weights[kind], module.Config(**self.options.get(kind, {})).build()))
            except TypeError as error:
                raise ValueError(
                    f"objective mix: options of {kind}: {error}: see conf/objective for its options"
                ) from error
        return tuple(parts)

    def build(self) -> Objective:
        """Return the objective."""
        return Mix(self._parts())
