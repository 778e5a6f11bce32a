"""Settings of DSpark drafts; the network, and where it comes from, is in `inference.feature_networks.dspark`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.feature_drafts._block import BlockConfig

if TYPE_CHECKING:
    from torch import Tensor

    from inference.feature_networks._layers import DraftShape
    from inference.feature_networks.dspark import DSpark

HEADS = ("markov", "gated", "rnn")


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A block drafter with a sequential head; see also `FeatureDraftConfig`.

    Attributes:
        kind: this kind.
        markov_head: `markov`, `gated` or `rnn`.
        markov_rank: r; each slot reads r numbers per token of the draft's vocabulary, so small on a CPU.
        confidence_weight: weight of the confidence head's loss.
    """

    kind: str = "dspark"
    markov_head: str = "markov"
    markov_rank: int = 64
    confidence_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.markov_head not in HEADS:
            raise ValueError(f"draft.dspark.markov_head is {self.markov_head!r}; choose one of {', '.join(HEADS)}")
        if self.markov_rank < 1 or self.confidence_weight < 0:
            raise ValueError("draft.dspark needs markov_rank of at least 1 and confidence_weight of at least 0")

    def build(self, shape: "DraftShape", taps: list[int], vocabulary: "Tensor | None") -> "DSpark":
        """See `FeatureDraftConfig.build`."""
        from inference.feature_networks.dspark import DSpark

        return DSpark(self, shape, taps, vocabulary)
