"""The DFlash backbone: a whole block in one pass, target features injected as keys and values of every layer.

Source: DFlash (Chen et al. 2026, arXiv 2602.06036), method section 2. Layer-normed block states and projected features
go through the same key and value matrices; the context is never updated by the layers. Inside a block attention is
bidirectional; of the context it sees what lies strictly before the anchor.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from inference.feature_drafts._block import TOKEN, BlockConfig
from inference.feature_networks import FeatureNetwork, PackedBatch
from inference.feature_networks._contexts import DraftContext
from inference.feature_networks._layers import (
    DraftLayer,
    DraftShape,
    KeysValues,
    Norm,
    plain_norm,
    same_parts,
)
from inference.layers import decoder_layers
from inference.model import CausalModel


class BlockNetwork(FeatureNetwork):
    """Projection, layers and norm. A subclass says which slots predict and what comes after them.

    Attributes:
        mask_token: token whose embedding stands for tokens to come; None where the draft has a vector of its own.
        extra: slots before the first one that predicts: 0 where the anchor's own slot does (DSpark), else 1 (DFlash).
    """

    extra = 0

    def __init__(self, config: BlockConfig, shape: DraftShape, taps: list[int], vocabulary: Tensor | None) -> None:
        super().__init__(config, shape, taps, vocabulary)
        self.fc = nn.Linear(len(taps) * shape.hidden, shape.hidden, bias=False)
        self.hidden_norm = Norm(shape.hidden, eps=shape.eps)
        self.layers = nn.ModuleList(DraftLayer(shape, qk_norm=config.qk_norm) for _ in range(config.layers))
        self.norm = Norm(shape.hidden, eps=shape.eps)
        self.mask_token = config.mask_token if config.mask == TOKEN else None
        # Drawn either way: what else is random does not depend on it.
        mask_embedding = torch.randn(shape.hidden) * 0.02
        if self.mask_token is None:
            self.mask_embedding = nn.Parameter(mask_embedding)
        else:
            self.register_buffer("mask_id", torch.tensor(self.mask_token), persistent=False)

    @property
    def width(self) -> int:
        """Slots of a block, those before the first prediction included."""
        return self.block + self.extra

    # One computation

    @property
    def mask_vector(self) -> Tensor:
        """What stands for tokens to come, `[D]`."""
        if self.mask_token is None:
            return self.mask_embedding
        return self.borrowed.embed(self.get_buffer("mask_id"))

    @property
    def stack(self) -> list[DraftLayer]:
        """The layers."""
        return [layer for layer in self.layers if isinstance(layer, DraftLayer)]

    def context(self, features: Tensor, positions: Tensor) -> KeysValues:
        """Keys and values of every layer for features `[batch, T, m * D]` at positions `[batch, T]`."""
        projected = self.hidden_norm(self.fc(features))
        rope = self.stack[0].self_attn.rope(positions, projected)
        return [layer.self_attn.keys_values(projected, rope) for layer in self.stack]

    def run(self, anchors: Tensor, positions: Tensor, context: KeysValues, mask: Tensor | None) -> Tensor:
        """Final states of blocks.

        Args:
            anchors: int64 `[batch, A]`, the anchors' tokens.
            positions: int64 `[batch, A]`, the anchors' positions.
            context: of `context`.
            mask: bool `[batch, 1, A * width, T + A * width]`, or None when all is visible.

        Returns:
            `[batch, A, block, D]`: the slots that predict.
        """
        batch, count = anchors.shape
        embedded = self.borrowed.embed(anchors).to(self.norm.weight.dtype)
        masks = self.mask_vector.to(embedded.dtype).expand(batch, count, self.width - 1, -1)
        states = torch.cat([embedded[:, :, None], masks], dim=2).reshape(batch, count * self.width, -1)
        slots = torch.arange(self.width, device=anchors.device)
        rope = self.stack[0].self_attn.rope((positions[..., None] + slots).reshape(batch, -1), states)
        for layer, keys_values in zip(self.stack, context, strict=True):
            states = layer(states, rope, keys_values, mask)
        final: Tensor = self.norm(states).reshape(batch, count, self.width, -1)
        return final[:, :, self.extra :]

    # Training

    def block_states(self, batch: PackedBatch) -> Tensor:
        """Final states of all blocks of a batch, `[R, A, G, D]`."""
        context = self.context(batch.features, batch.positions)
        anchors = batch.block_tokens(0)[..., 0]
        positions = batch.positions.gather(1, batch.anchors)
        return self.run(anchors, positions, context, self.mask(batch))

    def mask(self, batch: PackedBatch) -> Tensor:
        """Context strictly before the anchor, then the own block: bool `[R, 1, A * width, T + A * width]`."""
        rows, count = batch.anchors.shape
        seen = batch.context_mask().repeat_interleave(self.width, dim=1)
        real = batch.slots.any(-1).repeat_interleave(self.width, dim=1)
        block = torch.arange(count, device=seen.device).repeat_interleave(self.width)
        own = (block[:, None] == block[None, :]).expand(rows, -1, -1)
        return (torch.cat([seen, own], dim=2) & real[:, :, None])[:, None]

    def init_from(self, target: CausalModel) -> bool:
        """Copy the target's last layers, the final norm, and make the projection the identity on the last tap.

        Only for targets whose layers have these very parts (llama, qwen3 and their like); else nothing is changed.
        """
        sources = [target.whole(layer) for layer in list(decoder_layers(target.model))[-len(self.layers) :]]
        norm = dict(target.model.base_model.named_modules()).get("norm")
        if (
            len(sources) < len(self.layers)
            or not all(same_parts(source, self.shape.hidden) for source in sources)
            or norm is None
            or not plain_norm(norm, self.shape.hidden)
        ):
            return False
        entering = self._probe(target)
        with torch.no_grad():
            for layer, source, states in zip(self.stack, sources, entering, strict=True):
                named = dict(source.named_parameters())
                for name, parameter in layer.named_parameters():
                    if name in named:
                        parameter.copy_(named[name])
                    else:
                        self._match_scale(layer, name, states)
            self.hidden_norm.weight.copy_(sources[0].get_parameter("input_layernorm.weight"))
            self.norm.weight.copy_(norm.get_parameter("weight"))
            self.fc.weight.zero_()
            size = self.shape.hidden
            self.fc.weight[:, -size:] = torch.eye(size, device=self.fc.weight.device)
        return True

    def _probe(self, target: CausalModel) -> list[Tensor]:
        """What enters each copied layer, `[T, D]`, when the target reads random tokens."""
        generator = torch.Generator().manual_seed(0)
        length = min(64, target.context_limit // 2)
        probe = torch.randint(target.vocab_size, (length,), generator=generator).to(target.device)
        first, size = self.shape.target_layers - len(self.layers), self.shape.hidden
        taps = range(first - 1, self.shape.target_layers - 1)
        with torch.inference_mode(), target.tapped(taps) as features:
            target.logits(probe, target.new_cache(), num_rows=1)
            states = features.take()[0].to(self.norm.weight.dtype)
        return [states[:, i * size : (i + 1) * size].clone() for i in range(len(self.layers))]

    def _match_scale(self, layer: DraftLayer, name: str, states: Tensor) -> None:
        """Give a norm of queries or keys that the target lacks the size that its attention is used to."""
        projection = layer.get_submodule(name.replace("_norm.weight", "_proj"))
        heads = projection(layer.input_layernorm(states)).reshape(-1, self.shape.head_dim)
        layer.get_parameter(name).fill_(float(heads.pow(2).mean().sqrt()))

    # Decoding

    def read(self, features: Tensor, next_tokens: Tensor, cache: DraftContext) -> None:
        """See `FeatureNetwork.read`; the next tokens are not looked at."""
        positions = cache.coming(features.shape[0], features.device)
        cache.extend(self.context(features[None].to(self.norm.weight.dtype), positions))

    def decoded_states(self, anchors: Tensor, cache: DraftContext) -> Tensor:
        """Final states of a block behind each context of the cache, `[R, block, D]`."""
        mask = cache.mask()
        if mask is not None:
            mask = functional.pad(mask.expand(-1, -1, self.width, -1), (0, self.width), value=True)
        positions = cache.lengths(anchors.device)[:, None]
        return self.run(anchors[:, None], positions, cache.keys_values(), mask)[:, 0]
