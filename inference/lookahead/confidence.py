"""Stop when the chance that the whole block survives falls under a threshold."""

import math
from dataclasses import dataclass

from inference.lookahead import Visible


@dataclass(kw_only=True)
class Config:
    """A threshold on the cumulative confidence (method section 3, `confidence`).

    Attributes:
        kind: this policy.
        tokens: longest block, in tokens; 0 lets the score choose it per draft, as for `fixed`.
        longest_auto: longest block that the automatic choice may take.
        threshold: propose position k only while the product c_1..c_k is at least this.
    """

    kind: str = "confidence"
    tokens: int = 8
    longest_auto: int = 8
    threshold: float = 0.4

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"lookahead.tokens is {self.tokens}; use 0 for the automatic choice or a positive length")
        if self.longest_auto < 1:
            raise ValueError(f"lookahead.longest_auto is {self.longest_auto}; use at least 1")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"lookahead.threshold is {self.threshold}; use a probability in [0, 1]")

    def build(self, tokens: int) -> "ConfidenceLookahead":
        """The policy, with the longest block that was chosen for one draft."""
        return ConfidenceLookahead(tokens, threshold=self.threshold)


class ConfidenceLookahead:
    """Keeps a position while the cumulative confidence, this position included, stays at or above the threshold."""

    needs_confidence = True

    def __init__(self, tokens: int, *, threshold: float) -> None:
        self.max_tokens = tokens
        self.threshold = threshold

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        return visible.position <= self.max_tokens and math.prod(visible.confidences) >= self.threshold

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Nothing is learnt."""
