"""Medusa: a small head for every slot, all reading one state; the slots neither see each other nor attend to anything.

Source: Medusa (Cai et al. 2024, arXiv 2401.10774), section 2.1. Slot k gives `h + SiLU(W_k h)`, one residual block or
more, and that goes through the target's own head. Medusa takes h from the position that wrote the anchor and lets its
first head guess the anchor's successor without knowing the anchor. In our rounds the anchor is known before its
features are, so h is made of the features of the position before it and the anchor's embedding:
`h = norm(fc f_{a-1} + anchor_proj e_a)`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from inference.feature_drafts.medusa import Config
from inference.feature_networks import FeatureNetwork, PackedBatch, SlotHead, Step
from inference.feature_networks._contexts import DraftContext
from inference.feature_networks._layers import DraftShape, Norm
from inference.model import CausalModel

_PROBE_TOKENS = 64


class ResidualBlocks(nn.Module):
    """The blocks of one slot."""

    def __init__(self, size: int, *, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count))
        for parameter in self.parameters():
            # As in Medusa, a slot starts as h alone. SiLU has slope 1/2 at 0, so the block learns from there.
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        for layer in self.layers:
            states = states + functional.silu(layer(states))
        return states


class Medusa(FeatureNetwork):
    """See the module. Slot states are the heads' outputs, `[.., D]`."""

    def __init__(self, config: Config, shape: DraftShape, taps: list[int], vocabulary: Tensor | None) -> None:
        super().__init__(config, shape, taps, vocabulary)
        self.fc = nn.Linear(len(taps) * shape.hidden, shape.hidden, bias=False)
        self.anchor_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.norm = Norm(shape.hidden, eps=shape.eps)
        self.slots = nn.ModuleList(ResidualBlocks(shape.hidden, count=config.layers) for _ in range(config.block))
        self.head = SlotHead(self)

    # One computation

    def run(self, fused: Tensor, anchors: Tensor) -> Tensor:
        """States of all slots.

        Args:
            fused: `[..., D]`, projected features of the positions before the anchors.
            anchors: int64 `[...]`, the anchors' tokens.

        Returns:
            `[..., G, D]`.
        """
        embedded = self.borrowed.embed(anchors).to(fused.dtype)
        state = self.norm(fused + self.anchor_proj(embedded))
        return torch.stack([slot(state) for slot in self.slots], dim=-2)

    # Training

    def slot_states(self, batch: PackedBatch) -> Tensor:
        """See `FeatureNetwork.slot_states`."""
        # A padding anchor may stand in column 0; whatever it reads is not used.
        before = (batch.anchors - 1).clamp(min=0)
        features = batch.features.gather(1, before[..., None].expand(-1, -1, batch.features.shape[-1]))
        return self.run(self.fc(features), batch.block_tokens(0)[..., 0])

    def init_from(self, target: CausalModel) -> bool:
        """Start as what the target's final norm and head make of the last tap; the anchor comes in by training.

        The norm is measured rather than copied, because families store its weight in different ways. Exact where it is
        an RMS norm, the nearest one where it is not.
        """
        size = self.shape.hidden
        generator = torch.Generator().manual_seed(0)
        length = min(_PROBE_TOKENS, target.context_limit // 2)
        probe = torch.randint(target.vocab_size, (length,), generator=generator).to(target.device)
        with torch.inference_mode(), target.tapped([self.shape.target_layers - 1]) as features:
            with target.captured_states() as states:
                target.logits(probe, target.new_cache(), num_rows=length)
            entering, leaving = features.take()[0].double(), states[0][0].double()
        entering = functional.rms_norm(entering, (size,), eps=self.shape.eps)
        with torch.no_grad():
            self.norm.weight.copy_((entering * leaving).sum(0) / entering.square().sum(0))
            self.fc.weight.zero_()
            self.fc.weight[:, -size:] = torch.eye(size, device=self.fc.weight.device)
            self.anchor_proj.weight.zero_()
        return True

    # Decoding

    @property
    def cached_layers(self) -> int:
        """See `FeatureNetwork.cached_layers`. One that only counts positions: nothing is attended to."""
        return 1

    def read(self, features: Tensor, next_tokens: Tensor, cache: DraftContext) -> None:
        """See `FeatureNetwork.read`. The last position is kept and of the others only their number."""
        nothing = features.new_empty(1, 1, features.shape[0], 0)
        cache.extend([(nothing, nothing)])
        cache.keep_last(features[None])

    def begin_block(self, anchors: Tensor, cache: DraftContext) -> Tensor:
        """Logits of all slots, `[R, G, Vd]`."""
        fused = self.fc(cache.last[:, 0].to(self.norm.weight.dtype))
        return self.base_logits(self.run(fused, anchors))

    def step(self, block: Tensor, slot: int, previous: Tensor, *, confidence: bool) -> Step:
        """See `FeatureNetwork.step`; what was drawn before does not matter."""
        return Step(block[:, slot])
