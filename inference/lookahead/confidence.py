"""Stop when the chance that the whole block survives falls under a threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inference.lookahead import BlockConfig, Measured, SteadyLookahead, Visible


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A threshold on the cumulative confidence (method section 3, `confidence`); see also `BlockConfig`.

    Attributes:
        kind: this policy.
        tokens: longest block.
        threshold: propose position k only while the product c_1..c_k is at least this.
    """

    kind: str = "confidence"
    tokens: int = 8
    threshold: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"lookahead.threshold is {self.threshold}; use a probability in [0, 1]")

    def build(
        self, tokens: int, siblings: Sequence[int] = (), measured: Measured | None = None
    ) -> "ConfidenceLookahead":
        """See `BlockConfig.build`."""
        return ConfidenceLookahead(tokens, threshold=self.threshold, siblings=siblings)


class ConfidenceLookahead(SteadyLookahead):
    """Keeps a position while the cumulative confidence, this position included, stays at or above the threshold."""

    reads = frozenset({"confidence"})

    def __init__(self, tokens: int, *, threshold: float, siblings: Sequence[int] = ()) -> None:
        super().__init__(tokens, siblings=siblings)
        self.threshold = threshold

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        survival = math.prod(known.confidence for known in visible.signals)
        return super().keeps(visible) and survival >= self.threshold
