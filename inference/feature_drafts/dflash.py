"""Settings of DFlash drafts; the network, and where it comes from, is in `inference.feature_networks.dflash`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.feature_drafts._block import BlockConfig

if TYPE_CHECKING:
    from torch import Tensor

    from inference.feature_networks._layers import DraftShape
    from inference.feature_networks.dflash import DFlash


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A parallel block drafter; see `FeatureDraftConfig`."""

    kind: str = "dflash"

    def build(self, shape: "DraftShape", taps: list[int], vocabulary: "Tensor | None") -> "DFlash":
        """See `FeatureDraftConfig.build`."""
        from inference.feature_networks.dflash import DFlash

        return DFlash(self, shape, taps, vocabulary)
