"""DFlash: every token of a block predicted in one pass, independently of the others (Chen et al. 2026, 2602.06036).

The anchor's slot is read and not scored: 1 + G slots give G predictions, slot k that of token anchor + k.
"""

from torch import Tensor

from inference.feature_drafts.dflash import Config
from inference.feature_networks import PackedBatch, SlotHead, Step
from inference.feature_networks._block import BlockNetwork
from inference.feature_networks._contexts import DraftContext
from inference.feature_networks._layers import DraftShape
from inference.trees import Level


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

    def branch(self, block: Tensor, level: Level, previous: Tensor) -> Tensor:
        """See `FeatureNetwork.branch`; after all tokens of a depth the same."""
        return block[:, level.depth, None].expand(-1, level.count, -1)
