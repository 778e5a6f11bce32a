"""EAGLE-3: one decoder layer over [embedding ; feature], its own output standing in for features it does not have yet.

Source: EAGLE-3 (Li et al. 2025, arXiv 2503.01840), method section 2. Entry t pairs the fused features of position t
with the embedding of token t + 1, at rotary position t. The first step of a block reads the entry before the anchor;
step s > 0 reads the layer's own last output and the embedding of the token drawn before, one position on. It sees the
entries of the context up to there and its own earlier steps. Training unrolls the same steps (training-time test), at
sampled anchors only, so a step costs its anchors and not the whole sequence.

Tensor names follow EAGLE-3 checkpoints: `fc`, `layers.0.{hidden_norm, input_layernorm, ...}` with inputs of 2 D and
`norm`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inference.feature_drafts.eagle3 import Config
from inference.feature_networks import FeatureNetwork, PackedBatch, SlotHead, Step
from inference.feature_networks._contexts import DraftContext, TreeContext
from inference.feature_networks._layers import (
    DraftAttention,
    DraftMLP,
    DraftShape,
    Norm,
    Rope,
    attend,
    plain_norm,
    same_parts,
)
from inference.layers import decoder_layers
from inference.lean import rolled_tables
from inference.model import CausalModel
from inference.trees import Level


class EagleLayer(nn.Module):
    """A decoder layer whose attention reads `[norm(embedding) ; norm(hidden)]`; its residual is the hidden half."""

    def __init__(self, shape: DraftShape, *, qk_norm: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, eps=shape.eps)
        self.hidden_norm = Norm(shape.hidden, eps=shape.eps)
        self.self_attn = DraftAttention(shape, inputs=2 * shape.hidden, qk_norm=qk_norm)
        self.post_attention_layernorm = Norm(shape.hidden, eps=shape.eps)
        self.mlp = DraftMLP(shape)

    def entries(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What attention reads, `[..., 2 D]`."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], dim=-1)

    def finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output from its residual stream and what attention mixed."""
        hidden = hidden + self.self_attn.o_proj(mixed)
        result: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


# Acceptance hardly falls behind the steps that were unrolled in training (docs/experiments.md, 2026-11-30).
_DEEPEST = 16


@dataclass
class _Chain:
    """The blocks of R requests while they are being sampled."""

    hidden: Tensor  # shape: [R, 1, D], the output of the step before
    ropes: Rope  # shape: [R, 1, G, head_dim], of all steps
    keys: Tensor  # shape: [R, kv_heads, K, head_dim], context and own steps
    values: Tensor
    mask: Tensor | None  # shape: [R, 1, 1, K]
    context: DraftContext


@dataclass
class _Tree:
    """The trees of R requests while they are being drafted."""

    hidden: Tensor  # shape: [R, count, D], the outputs of the level before
    tables: Rope  # shape: [R, D, 1, head_dim], of all levels, see `rolled_tables`
    context: TreeContext


class Eagle3(FeatureNetwork):
    """See the module. Slot states are the layer's normed outputs, `[.., D]`."""

    def __init__(self, config: Config, shape: DraftShape, taps: list[int], vocabulary: Tensor | None) -> None:
        super().__init__(config, shape, taps, vocabulary)
        self.fc = nn.Linear(len(taps) * shape.hidden, shape.hidden, bias=False)
        self.layer_shape = replace(shape, intermediate=config.intermediate or shape.intermediate)
        self.layers = nn.ModuleList([EagleLayer(self.layer_shape, qk_norm=config.qk_norm)])
        self.norm = Norm(shape.hidden, eps=shape.eps)
        self.head = SlotHead(self)

    @property
    def layer(self) -> EagleLayer:
        """The one layer."""
        layer = self.layers[0]
        assert isinstance(layer, EagleLayer), "an EAGLE-3 draft has one layer of its own kind"
        return layer

    # Training

    def slot_states(self, batch: PackedBatch) -> Tensor:
        """See `FeatureNetwork.slot_states`: the steps unrolled at every anchor, tokens teacher-forced."""
        return self.first_slot_states(batch, self.block)

    def first_slot_states(self, batch: PackedBatch, length: int) -> Tensor:
        """See `FeatureNetwork.first_slot_states`."""
        layer, attention = self.layer, self.layer.self_attn
        fused = self.fc(batch.features)
        # Entry t reads token t + 1; the last column's is never seen, because an anchor sees entries before its own.
        following = torch.roll(batch.tokens, -1, dims=1)
        entries = layer.entries(self.embed(following, fused), fused)
        keys, values = attention.keys_values(entries, attention.rope(batch.positions, entries))
        mask = batch.context_mask()
        before = (batch.anchors - 1).clamp(min=0)
        hidden = fused.gather(1, before[..., None].expand(-1, -1, fused.shape[-1]))
        positions = batch.positions.gather(1, batch.anchors) - 1
        tokens = batch.block_tokens(length - 1)
        own = torch.eye(batch.anchors.shape[1], dtype=torch.bool, device=mask.device).expand(mask.shape[0], -1, -1)
        outputs = []
        for step in range(length):
            entry = layer.entries(self.embed(tokens[:, :, step], hidden), hidden)
            rope = attention.rope(positions + step, entry)
            if step:
                more = attention.keys_values(entry, rope)
                keys, values = torch.cat([keys, more[0]], dim=2), torch.cat([values, more[1]], dim=2)
                mask = torch.cat([mask, own], dim=2)
            mixed = attend(attention.queries(entry, rope), keys, values, mask[:, None])
            hidden = layer.finish(hidden, mixed)
            outputs.append(hidden)
        states: Tensor = self.norm(torch.stack(outputs, dim=2))
        return states

    def embed(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The target's embedding in this network's arithmetic."""
        return self.borrowed.embed(tokens).to(like.dtype)

    def init_from(self, target: CausalModel) -> bool:
        """Copy the target's last layer into the hidden half; the embedding half is zero, `fc` is the last tap. A wider
        feed-forward part adds nothing at first, a narrower one is random."""
        layer = target.whole(decoder_layers(target.model)[-1])
        norm = dict(target.model.base_model.named_modules()).get("norm")
        size = self.shape.hidden
        if not same_parts(layer, size) or norm is None or not plain_norm(norm, size):
            return False
        source, mine = dict(layer.named_parameters()), dict(self.layer.named_parameters())
        halves = {f"self_attn.{name}_proj.weight" for name in "qkv"}
        whole = [name for name in mine if name in source and name not in halves]
        inner = self.shape.intermediate
        with torch.no_grad():
            if self.layer_shape.intermediate < inner:
                whole = [name for name in whole if not name.startswith("mlp.")]
            elif self.layer_shape.intermediate > inner:
                mine["mlp.down_proj.weight"][:, inner:] = 0.0
            for name in whole:
                rows, *columns = source[name].shape
                mine[name][(slice(rows), *map(slice, columns))] = source[name]
            for name in halves:
                mine[name].zero_()
                mine[name][:, size:].copy_(source[name])
            mine["hidden_norm.weight"].copy_(source["input_layernorm.weight"])
            self.fc.weight.zero_()
            self.fc.weight[:, -size:] = torch.eye(size, device=self.fc.weight.device)
            self.norm.weight.copy_(norm.get_parameter("weight"))
        return True

    # Decoding

    def read(self, features: Tensor, next_tokens: Tensor, cache: DraftContext) -> None:
        """See `FeatureNetwork.read`. The last fused feature is kept: the next block starts from it."""
        fused = self.fc(features[None].to(self.norm.weight.dtype))
        entries = self.layer.entries(self.embed(next_tokens[None], fused), fused)
        rope = self.layer.self_attn.rope(cache.coming(features.shape[0], features.device), entries)
        cache.extend([self.layer.self_attn.keys_values(entries, rope)])
        cache.keep_last(fused)

    def begin_block(self, anchors: Tensor, cache: DraftContext) -> _Chain:
        """The chain before its first step; that step's own entry is the last of the context."""
        [(keys, values)] = cache.keys_values()
        steps = torch.arange(-1, self.block - 1, device=anchors.device)
        ropes = self.layer.self_attn.rope(cache.lengths(anchors.device)[:, None] + steps, cache.last)
        return _Chain(cache.last, ropes, keys, values, cache.mask(), cache)

    def step(self, block: _Chain, slot: int, previous: Tensor, *, confidence: bool) -> Step:
        """See `FeatureNetwork.step`."""
        layer, attention = self.layer, self.layer.self_attn
        entry = layer.entries(self.embed(previous[:, None], block.hidden), block.hidden)
        rope = block.ropes[0][:, :, slot : slot + 1], block.ropes[1][:, :, slot : slot + 1]
        if slot:
            own = attention.keys_values(entry, rope)
            block.keys, block.values, block.mask = block.context.lengthen(*own)
        mixed = attend(attention.queries(entry, rope), block.keys, block.values, block.mask)
        block.hidden = layer.finish(block.hidden, mixed)
        return Step(self.base_logits(self.norm(block.hidden))[:, 0])

    @property
    def deepest(self) -> int:
        """See `FeatureNetwork.deepest`: steps may go on behind those of a block."""
        return max(self.block, _DEEPEST)

    def join_weights(self) -> None:
        """See `FeatureNetwork.join_weights`."""
        self.layer.self_attn.join_weights()
        self.layer.mlp.join_weights()

    def begin_tree(self, anchors: Tensor, cache: TreeContext, depth: int) -> _Tree:
        """See `FeatureNetwork.begin_tree`."""
        steps = torch.arange(-1, depth - 1, device=anchors.device)
        cosine, sine = self.layer.self_attn.rope(cache.lengths(anchors.device)[:, None] + steps, cache.last)
        return _Tree(cache.last, rolled_tables(cosine[:, 0], sine[:, 0]), cache)

    def branch(self, block: _Tree, level: Level, previous: Tensor) -> Tensor:
        """See `FeatureNetwork.branch`."""
        layer, depth = self.layer, level.depth
        hidden = block.hidden if level.before is None else block.hidden.index_select(1, level.before)
        entry = layer.entries(self.embed(previous, hidden), hidden)
        tables = block.tables[0][:, depth : depth + 1], block.tables[1][:, depth : depth + 1]
        mixed = block.context.branch(level, *layer.self_attn.projected(entry, tables))
        block.hidden = layer.finish(hidden, mixed)
        return self.base_logits(self.norm(block.hidden))
