"""Settings of Medusa drafts; the network, and where it comes from, is in `inference.feature_networks.medusa`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.feature_drafts import FeatureDraftConfig

if TYPE_CHECKING:
    from torch import Tensor

    from inference.feature_networks._layers import DraftShape
    from inference.feature_networks.medusa import Medusa

# One D x D product, in decoder layers: attention and feed-forward of the usual proportions are about ten of them.
_PRODUCT_WORK = 0.1


@dataclass(kw_only=True)
class Config(FeatureDraftConfig):
    """Independent heads on one state; see also `FeatureDraftConfig`.

    Attributes:
        kind: this kind.
        block: tokens proposed a round, each by a head of its own.
        layers: residual blocks of each head.
        lr: as `FeatureDraftConfig.lr`.
    """

    kind: str = "medusa"
    block: int = 4
    layers: int = 1
    lr: float = 1e-3

    def step_work(
        self, *, prompt_tokens: float, response_tokens: float, num_target_layers: int, vocab_size: int
    ) -> tuple[float, float]:
        """See `FeatureDraftConfig.step_work`. Only what an anchor reads is projected, and a slot has no decoder layer:
        the work is D x D products, one a tap and one for the embedding, and those of the slots' blocks."""
        _, head_positions = super().step_work(
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            num_target_layers=num_target_layers,
            vocab_size=vocab_size,
        )
        products = len(self.tapped_layers(num_target_layers)) + 1 + self.block * self.layers
        return _PRODUCT_WORK * products * min(self.anchors, response_tokens), head_positions

    def build(self, shape: "DraftShape", taps: list[int], vocabulary: "Tensor | None") -> "Medusa":
        """See `FeatureDraftConfig.build`."""
        from inference.feature_networks.medusa import Medusa

        return Medusa(self, shape, taps, vocabulary)
