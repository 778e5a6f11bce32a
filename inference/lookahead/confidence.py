"""Stop when the chance that the whole block survives falls under a threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inference.lookahead import BlockConfig, Chances, Measured, SteadyLookahead, Visible


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A threshold on the cumulative confidence (method section 3, `confidence`); see also `BlockConfig`.

    Confidences are calibrated where a calibration was measured.

    Attributes:
        kind: this policy.
        tokens: longest block.
        threshold: propose position k only while the product c_1..c_k is at least this.
    """

    calibrates = True

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
        chances = measured.chances if measured is not None else Chances()
        return ConfidenceLookahead(tokens, threshold=self.threshold, chances=chances, siblings=siblings)


class ConfidenceLookahead(SteadyLookahead):
    """Keeps a position while the cumulative confidence, this position included, stays at or above the threshold."""

    def __init__(
        self, tokens: int, *, threshold: float, chances: Chances | None = None, siblings: Sequence[int] = ()
    ) -> None:
        super().__init__(tokens, siblings=siblings)
        self.threshold, self.chances = threshold, chances or Chances()
        self.reads = self.chances.reads

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        return super().keeps(visible) and math.prod(self.chances.of(visible.signals)) >= self.threshold
