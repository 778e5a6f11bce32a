"""Stop where the draft's own uncertainty leaves little hope: a bound on acceptance from the entropy of its row.

Source: AdaEDL (Agrawal et al. 2024, arXiv 2410.18351): 1 - sqrt(gamma H(q_k)) bounds the acceptance of position k from
below; H is known before x_k is sampled, so the rule is lossless at any temperature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inference.lookahead import BlockConfig, Measured, SteadyLookahead, Visible


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A threshold on the entropy bound; see also `BlockConfig`.

    Attributes:
        kind: this policy.
        tokens: longest block.
        threshold: propose position k only while the bound is at least this.
        gamma: weight of the entropy, per nat.
    """

    kind: str = "entropy"
    tokens: int = 8
    threshold: float = 0.4
    gamma: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"lookahead.threshold is {self.threshold}; use a probability in [0, 1]")
        if not 0.0 < self.gamma < math.inf:
            raise ValueError(f"lookahead.gamma is {self.gamma}; use a positive number")

    def build(self, tokens: int, siblings: Sequence[int] = (), measured: Measured | None = None) -> "EntropyLookahead":
        """See `BlockConfig.build`."""
        return EntropyLookahead(tokens, threshold=self.threshold, gamma=self.gamma, siblings=siblings)


class EntropyLookahead(SteadyLookahead):
    """Keeps a position while the bound stays at or above the threshold; without a row nothing speaks against it."""

    reads = frozenset({"entropy"})

    def __init__(self, tokens: int, *, threshold: float, gamma: float, siblings: Sequence[int] = ()) -> None:
        super().__init__(tokens, siblings=siblings)
        self.threshold, self.gamma = threshold, gamma

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        entropy = visible.signals[-1].entropy
        unknown = math.isnan(entropy)
        return super().keeps(visible) and (unknown or 1.0 - math.sqrt(self.gamma * entropy) >= self.threshold)
