"""DSpark: the DFlash backbone, a small sequential head that looks at the token before, and a confidence head.

Source: DSpark (Cheng et al. 2026), method section 2. The anchor's slot predicts too: G slots give G predictions. The
head adds `W2 z` to a slot's base logits, where z of width r depends on the previous token x alone (`markov`), is gated
by the slot's state (`gated`), or comes from a small recurrence (`rnn`). Confidence is sigmoid(w . [h ; W1 x]).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inference.feature_drafts.dspark import Config
from inference.feature_networks import PackedBatch, SlotHead, Step
from inference.feature_networks._block import BlockNetwork
from inference.feature_networks._contexts import DraftContext, TreeContext
from inference.feature_networks._layers import DraftShape
from inference.trees import Level


class MarkovHead(nn.Module):
    """z from the previous token and, depending on the mode, the slot's state and a recurrent one.

    Tensor names are those of DSpark checkpoints: `markov_w1` (an embedding), `markov_w2`, `gate_proj`, `joint_proj`.
    """

    def __init__(self, shape: DraftShape, *, rank: int, mode: str, vocabulary_size: int) -> None:
        super().__init__()
        self.mode, self.rank = mode, rank
        self.markov_w1 = nn.Embedding(shape.vocab, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary_size, bias=False)
        if mode == "gated":
            self.gate_proj = nn.Linear(shape.hidden + rank, rank)
        if mode == "rnn":
            self.joint_proj = nn.Linear(2 * rank + shape.hidden, 3 * rank)
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        # The draft starts as its backbone alone: no bias at first.
        nn.init.zeros_(self.markov_w2.weight)

    def start(self, states: Tensor) -> Tensor:
        """The recurrent state before the first slot, `[..., r]`, for slot states `[..., D]`."""
        return states.new_zeros((*states.shape[:-1], self.rank))

    def forward(self, states: Tensor, before: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """One slot.

        Args:
            states: the slot's own, `[..., D]`.
            before: W1 of the previous token, `[..., r]`.
            carried: recurrent state `[..., r]`; only `rnn` reads it.

        Returns:
            z `[..., r]`, and the state for the next slot.
        """
        if self.mode == "markov":
            return before, carried
        if self.mode == "gated":
            return before * torch.sigmoid(self.gate_proj(torch.cat([states, before], dim=-1))), carried
        gate, candidate, output = self.joint_proj(torch.cat([carried, before, states], dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * carried + (1.0 - gate) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """Chance that a slot's token is accepted, from its state and W1 of the previous token."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Logits `[...]` of `[..., inputs]`."""
        logits: Tensor = self.proj(states)[..., 0]
        return logits


@dataclass
class _Block:
    """The blocks of R requests while they are being sampled."""

    states: Tensor  # shape: [R, G, D]
    logits: Tensor  # shape: [R, G, Vd], without the sequential head
    carried: Tensor  # shape: [R, r]; of a tree, [R, count, r] of the level before


class DSpark(BlockNetwork):
    """See the module. Slot states are `[h ; z ; W1 x]`: the head reads the first two, the confidence all but z."""

    def __init__(self, config: Config, shape: DraftShape, taps: list[int], vocabulary: Tensor | None) -> None:
        super().__init__(config, shape, taps, vocabulary)
        size = shape.vocab if vocabulary is None else vocabulary.shape[0]
        self.markov_head = MarkovHead(shape, rank=config.markov_rank, mode=config.markov_head, vocabulary_size=size)
        self.confidence_head = ConfidenceHead(shape.hidden + config.markov_rank)
        self.head = SlotHead(self, self.markov_head.markov_w2)

    def slot_states(self, batch: PackedBatch) -> Tensor:
        """See `FeatureNetwork.slot_states`; the previous tokens are the target's own."""
        states = self.block_states(batch)
        before = self.markov_head.markov_w1(batch.block_tokens(self.block - 1)).to(states.dtype)
        carried = self.markov_head.start(states[:, :, 0])
        biases = []
        for slot in range(self.block):
            bias, carried = self.markov_head(states[:, :, slot], before[:, :, slot], carried)
            biases.append(bias)
        return torch.cat([states, torch.stack(biases, dim=2), before], dim=-1)

    def confidence_logits(self, states: Tensor) -> Tensor:
        """See `FeatureNetwork.confidence_logits`; its loss moves the backbone too, as in the paper's recipe."""
        hidden, rank = self.shape.hidden, self.markov_head.rank
        logits: Tensor = self.confidence_head(torch.cat([states[..., :hidden], states[..., hidden + rank :]], dim=-1))
        return logits

    def begin_block(self, anchors: Tensor, cache: DraftContext) -> _Block:
        """The backbone's part of a block."""
        states = self.decoded_states(anchors, cache)
        return _Block(states, self.base_logits(states), self.markov_head.start(states[:, 0]))

    def step(self, block: _Block, slot: int, previous: Tensor, *, confidence: bool) -> Step:
        """See `FeatureNetwork.step`."""
        state = block.states[:, slot]
        before = self.markov_head.markov_w1(previous)
        bias, block.carried = self.markov_head(state, before, block.carried)
        logits = block.logits[:, slot] + self.markov_head.markov_w2(bias)
        if not confidence:
            return Step(logits)
        return Step(logits, torch.sigmoid(self.confidence_head(torch.cat([state, before], dim=-1)).float()))

    def begin_tree(self, anchors: Tensor, cache: TreeContext, depth: int) -> _Block:
        """See `FeatureNetwork.begin_tree`."""
        block = self.begin_block(anchors, cache)
        block.carried = block.carried[:, None]
        return block

    def branch(self, block: _Block, level: Level, previous: Tensor) -> Tensor:
        """See `FeatureNetwork.branch`."""
        state = block.states[:, level.depth, None].expand(-1, level.count, -1)
        before = self.markov_head.markov_w1(previous)
        carried = block.carried if level.before is None else block.carried.index_select(1, level.before)
        bias, block.carried = self.markov_head(state, before, carried)
        logits: Tensor = block.logits[:, level.depth, None] + self.markov_head.markov_w2(bias)
        return logits
