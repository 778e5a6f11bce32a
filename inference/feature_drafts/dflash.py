"""DFlash: every token of a block predicted in one pass, independently of the others (Chen et al. 2026, 2602.06036).

The anchor's slot is read and not scored: 1 + G slots give G predictions, slot k that of token anchor + k.
"""

from dataclasses import dataclass

from torch import Tensor

from inference.feature_drafts import PackedBatch, SlotHead, Step
from inference.feature_drafts._block import BlockConfig, BlockNetwork
from inference.feature_drafts._layers import DraftContext, DraftShape


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A parallel block drafter; see `FeatureDraftConfig`."""

    kind: str = "dflash"

    def build(self, shape: DraftShape, taps: list[int], vocabulary: Tensor | None) -> "DFlash":
        """See `FeatureDraftConfig.build`."""
        return DFlash(self, shape, taps, vocabulary)


class DFlash(BlockNetwork):
    """See the module."""

    extra = 1

    def __init__(self, config: Config, shape: DraftShape, taps: list[int], vocabulary: Tensor | None) -> None:
        super().__init__(config, shape, taps, vocabulary)
        self.head = SlotHead(self)

    def slot_states(self, batch: PackedBatch) -> Tensor:
        """See `FeatureNetwork.slot_states`."""
        return self.block_states(batch)

    def begin_block(self, anchors: Tensor, cache: DraftContext) -> Tensor:
        """Logits of all slots, `[R, G, Vd]`."""
        return self.base_logits(self.decoded_states(anchors, cache))

    def step(self, block: Tensor, slot: int, previous: Tensor, *, confidence: bool) -> Step:
        """See `FeatureNetwork.step`; what was drawn before does not matter."""
        return Step(block[:, slot])


__all__ = ["Config", "DFlash"]
