"""Drafts that read the target's features: the settings of each kind, one module a kind, each with a `Config`.

Settings alone, so that a configuration is composed without torch: `build` imports the network, which is in the module
of the same name in `inference.feature_networks`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from inference.taps import default_taps

if TYPE_CHECKING:
    from torch import Tensor

    from inference.feature_networks import FeatureNetwork
    from inference.feature_networks._layers import DraftShape
    from inference.model import CausalModel

INITS = ("target", "random")
TRAINING = (
    "lr",
    "sequences_per_step",
    "anchors",
    "row_tokens",
    "max_tokens",
    "chunk_tokens",
    "position_decay",
    "prompt_share",
    "start_from",
    "training_weight",
)
"""Settings that say how a draft is trained; the others say what it is."""
# Projecting a context token, in layers: m * D numbers to D, and the keys and values of each layer.
_CONTEXT_WORK = 0.5


@dataclass(kw_only=True)
class FeatureDraftConfig:
    """What all kinds have in common: architecture first, then how the training stage feeds them.

    Attributes:
        block: tokens proposed a round.
        layers: decoder layers of the draft.
        taps: target layers read (decoder indices); empty for `num_taps` spread from layer 1 to n - 3.
        vocabulary: tokens the draft can propose, the most frequent ones of the training responses; 0 for all.
        init: `target` starts the layers from the target's last ones and the projection as the identity on the last tap,
            where the shapes allow it; `random` does not.
        lr: peak learning rate in place of the optimizer's own; 0 keeps that.
        sequences_per_step: conversations in one micro-batch.
        anchors: anchors drawn in each of them.
        row_tokens: conversations are packed into rows of about this many tokens.
        max_tokens: longer conversations are cut.
        chunk_tokens: positions whose vocabulary-wide rows exist at one time; 0 for as many as suit the device.
        position_decay: slot k (from 0) weighs exp(-k / position_decay); 0 weighs all alike.
        prompt_share: share of a conversation's anchors that are drawn from its prompts, where the target's distribution
            is known too; 0 learns from responses alone.
        start_from: name of a draft of this kind in the list of drafts, from whose weights training goes on; what the
            network is, down to its vocabulary, is then that draft's. Empty to start anew.
        training_weight: part of the time for training, by that of the other trained drafts.
    """

    kind: str
    block: int = 7
    layers: int = 2
    taps: list[int] = field(default_factory=list)
    vocabulary: int = 12_288
    init: str = "target"
    lr: float = 3e-3
    sequences_per_step: int = 4
    anchors: int = 16
    row_tokens: int = 1024
    max_tokens: int = 512
    chunk_tokens: int = 0
    position_decay: float = 4.0
    prompt_share: float = 0.0
    start_from: str = ""
    training_weight: float = 1.0

    trained = True
    num_taps = 5
    training_overhead = 1.25
    """Time of a step over that of its products; from runs on two CPU cores."""
    layers_read: ClassVar[int | None] = None
    """Last layers of the target whose weights `init: target` copies; None where it runs the target."""
    confidence_weight = 0.0
    """Weight of the confidence head's loss, for kinds that have such a head."""

    def __post_init__(self) -> None:
        for name in ("block", "layers", "sequences_per_step", "anchors", "row_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"draft.{self.kind}.{name} is {getattr(self, name)}; use at least 1")
        for name in ("vocabulary", "lr", "chunk_tokens", "position_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"draft.{self.kind}.{name} is {getattr(self, name)}; use 0 or more")
        if not self.training_weight > 0:
            raise ValueError(f"draft.{self.kind}.training_weight is {self.training_weight}; use more than 0")
        if not 0 <= self.prompt_share < 1:
            raise ValueError(f"draft.{self.kind}.prompt_share is {self.prompt_share}; use 0 up to, but not, 1")
        if self.init not in INITS:
            raise ValueError(f"draft.{self.kind}.init is {self.init!r}; choose one of {', '.join(INITS)}")

    def step_work(
        self, *, prompt_tokens: float, response_tokens: float, num_target_layers: int, vocab_size: int
    ) -> tuple[float, float]:
        """What one conversation costs in a step, for the time plan: token-layers, and positions through a whole head.

        Every token of the context is projected, which costs about half a layer; every slot goes through the layers and
        through both heads, cut to the draft's vocabulary.
        """
        slots = min(self.anchors, response_tokens) * self.block
        tokens = min(self.max_tokens, prompt_tokens + response_tokens)
        share = (self.vocabulary or vocab_size) / vocab_size
        return self.layers * slots + _CONTEXT_WORK * tokens, slots * min(share, 1.0)

    def tapped_layers(self, num_target_layers: int) -> list[int]:
        """Target layers read."""
        return list(self.taps) or default_taps(num_target_layers, self.num_taps)

    def for_target(self, target: "CausalModel") -> "FeatureDraftConfig":
        """These settings with what only the target can settle.

        Raises:
            InputError: the target has not what they ask for.
        """
        return self

    def build(self, shape: "DraftShape", taps: list[int], vocabulary: "Tensor | None") -> "FeatureNetwork":
        """The untrained network.

        Args:
            shape: of the target.
            taps: target layers read.
            vocabulary: sorted target ids of the tokens it can propose, int64 `[Vd]`; None for all.
        """
        raise NotImplementedError
