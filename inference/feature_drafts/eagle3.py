"""Settings of EAGLE-3 drafts; the network, and where it comes from, is in `inference.feature_networks.eagle3`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.feature_drafts import FeatureDraftConfig

if TYPE_CHECKING:
    from torch import Tensor

    from inference.feature_networks._layers import DraftShape
    from inference.feature_networks.eagle3 import Eagle3


@dataclass(kw_only=True)
class Config(FeatureDraftConfig):
    """An autoregressive feature drafter; see `FeatureDraftConfig`. Its training unrolls `block` steps.

    Attributes:
        kind: this kind.
        block: tokens proposed a round; each is a pass of the draft, so fewer pay than for a block drafter.
        qk_norm: norm queries and keys per head; published EAGLE-3 drafts do not.
        intermediate: width of the feed-forward part; 0 for the target's. A wider one costs next to nothing where the
            number of kernels is what counts, as on a GPU with a small target.
    """

    kind: str = "eagle3"
    block: int = 3
    vocabulary: int = 4096
    anchors: int = 32
    layers: int = 1
    qk_norm: bool = False
    intermediate: int = 0

    num_taps = 3
    layers_read = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != 1:
            raise ValueError(f"draft.eagle3.layers is {self.layers}; EAGLE-3 has one layer")
        if self.intermediate < 0:
            raise ValueError(f"draft.eagle3.intermediate is {self.intermediate}; use 0 or more")

    def build(self, shape: "DraftShape", taps: list[int], vocabulary: "Tensor | None") -> "Eagle3":
        """See `FeatureDraftConfig.build`."""
        from inference.feature_networks.eagle3 import Eagle3

        return Eagle3(self, shape, taps, vocabulary)
