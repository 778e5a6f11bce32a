"""Networks of drafts that read the target's features, one module a kind; settings are in `inference.feature_drafts`.

A network is written once for any causal LM. It borrows the target's embedding and output head, sees features of
verified tokens alone, and offers two faces of one computation: `slot_states` over whole packed sequences for training,
and `read` / `begin_block` / `step` with a cache for decoding. Tests hold them equal.

`_checkpoint` writes and reads their folders.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inference.feature_drafts import FeatureDraftConfig
from inference.feature_networks._contexts import DraftCache, DraftContext, TreeContext
from inference.feature_networks._layers import DraftShape
from inference.layers import LayerNotLoaded
from inference.model import CausalModel
from inference.taps import EMBEDDING, check_taps
from inference.trees import Level, Tree


@dataclass(frozen=True)
class PackedBatch:
    """Whole conversations packed into R rows of T tokens, with A anchors a row and G slots each.

    Attributes:
        tokens: int64 `[R, T]`.
        segments: int64 `[R, T]`, which conversation of the row a token belongs to; -1 for padding.
        positions: int64 `[R, T]`, position within its conversation.
        features: `[R, T, m * D]`.
        anchors: int64 `[R, A]`, columns of the anchors; each is followed by a supervised token and is not the first of
            its conversation. Padding repeats some column.
        slots: bool `[R, A, G]`, true where slot k's token is supervised and so are all before it; a padding anchor has
            none.
    """

    tokens: Tensor
    segments: Tensor
    positions: Tensor
    features: Tensor
    anchors: Tensor
    slots: Tensor

    def block_tokens(self, length: int) -> Tensor:
        """The anchors' tokens and the `length` after them, int64 `[R, A, 1 + length]`; what is past the row is 0."""
        columns = self.anchors[..., None] + torch.arange(length + 1, device=self.anchors.device)
        inside = columns < self.tokens.shape[1]
        rows = torch.arange(self.tokens.shape[0], device=self.anchors.device)[:, None, None]
        return torch.where(inside, self.tokens[rows, columns.clamp(max=self.tokens.shape[1] - 1)], 0)

    def context_mask(self) -> Tensor:
        """Which context columns an anchor sees: those of its conversation strictly before it.

        Returns:
            bool `[R, A, T]`.
        """
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        mine = self.segments.gather(1, self.anchors)
        same = self.segments[:, None, :] == mine[:, :, None]
        return same & (columns < self.anchors[:, :, None])


@dataclass(frozen=True)
class Step:
    """One slot's outcome, for the blocks of R requests.

    Attributes:
        logits: `[R, Vd]`, over the draft's vocabulary.
        confidence: chance in (0, 1) that the token survives given that all before it did, `[R]`; None when the network
            has no such head.
    """

    logits: Tensor
    confidence: Tensor | None = None


class Borrowed:
    """The target's embedding and output head: used, never trained, never saved."""

    def __init__(self, target: CausalModel) -> None:
        self._embedding = target.embedding
        self.head = target.head
        self.scale = embedding_scale(target)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the target's first layer reads for tokens, `[..., D]`, without learned positions."""
        with torch.no_grad():
            states: Tensor = self._embedding(tokens)
        return states if self.scale == 1.0 else states * self.scale


def embedding_scale(target: CausalModel) -> float:
    """The factor some families put between the embedding and the first layer, measured; 1 where there is none."""
    token = torch.zeros(1, dtype=torch.long, device=target.device) + target.vocab_size // 2
    with torch.inference_mode(), target.tapped([EMBEDDING]) as features:
        with suppress(LayerNotLoaded):  # what enters the first layer is known by then
            target.logits(token, target.new_cache(), num_rows=1)
        entering = features.take()[0, 0].double()
        embedded = target.embedding(token)[0].double()
    factor = float((entering @ embedded) / (embedded @ embedded))
    left = float((entering - factor * embedded).norm() / entering.norm())
    return factor if left < 1e-2 and abs(factor - 1.0) > 1e-3 else 1.0


class FeatureNetwork(nn.Module):
    """A draft network.

    Attributes:
        config: its settings.
        shape: of the target.
        layer_shape: of the draft's own layers.
        taps: target layers it reads.
        block: tokens it proposes a round.
        vocabulary: sorted target ids it can propose, int64 `[Vd]`, or None for all.
        head: slot states `[n, S]` to logits `[n, Vd]`; parameters that take a gradient are the draft's own.
        borrowed: set by `bind`.
    """

    head: nn.Module
    vocabulary: Tensor | None

    def __init__(self, config: FeatureDraftConfig, shape: DraftShape, taps: list[int], vocabulary: Tensor | None):
        super().__init__()
        self.config, self.shape, self.taps, self.block = config, shape, list(taps), config.block
        self.layer_shape = shape
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        if vocabulary is not None:
            self.lm_head = nn.Linear(shape.hidden, vocabulary.shape[0], bias=False).requires_grad_(False)
        self._borrowed: tuple[Borrowed, ...] = ()

    def borrow(self, parts: Borrowed) -> None:
        """Use these parts of the target."""
        # In a tuple, so that the target's modules do not become this module's own.
        self._borrowed = (parts,)

    def bind(self, target: CausalModel, *, copy_head: bool = False) -> None:
        """Borrow the target's embedding and head.

        Args:
            target: on this network's device.
            copy_head: also copy the head's rows of the reduced vocabulary (a new network; a loaded one has them).
        """
        self.borrow(Borrowed(target))
        if copy_head and self.vocabulary is not None:
            with torch.no_grad():
                weight = target.head.linear.get_parameter("weight")
                self.lm_head.weight.copy_(weight[self.vocabulary.to(weight.device)])

    @property
    def borrowed(self) -> Borrowed:
        """The target's parts."""
        return self._borrowed[0]

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: `head` only names again what others own."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("head.")}

    def base_logits(self, states: Tensor) -> Tensor:
        """The target's head over the draft's vocabulary, soft-cap and scale included: `[..., D]` to `[..., Vd]`."""
        head = self.borrowed.head
        if self.vocabulary is None:
            logits: Tensor = head(states)
            return logits
        return head.after(self.lm_head(states))

    # Training

    def slot_states(self, batch: PackedBatch) -> Tensor:
        """What enters `head` in every slot, teacher-forced: `[R, A, G, S]`; slots that are not valid hold anything."""
        raise NotImplementedError

    def first_slot_states(self, batch: PackedBatch, length: int) -> Tensor:
        """`slot_states` of the first so many slots, at most `deepest`."""
        return self.slot_states(batch)[:, :, :length]

    def confidence_logits(self, states: Tensor) -> Tensor | None:
        """Logits `[n]` of the chance that a slot's token is accepted, from `[n, S]`; None without such a head."""
        return None

    def init_from(self, target: CausalModel) -> bool:
        """Start from the target's layers; false where the shapes do not allow it and nothing was changed."""
        return False

    # Decoding

    def join_weights(self) -> None:
        """Let products that read the same be one, where that saves kernels; see `inference.lean.as_one`."""

    @property
    def cached_layers(self) -> int:
        """Layers whose keys and values a context keeps."""
        return self.config.layers

    def new_cache(self) -> DraftCache:
        """An empty context of one request."""
        return DraftCache(self.cached_layers)

    def read(self, features: Tensor, next_tokens: Tensor, cache: DraftContext) -> None:
        """Add verified tokens to the contexts.

        Args:
            features: `[n, m * D]`, of the n tokens after those in the cache, request by request.
            next_tokens: int64 `[n]`, the token after each of them.
            cache: extended by n positions; it knows whose they are.
        """
        raise NotImplementedError

    def begin_block(self, anchors: Tensor, cache: DraftContext) -> Any:
        """Everything about a block that does not depend on its own tokens; `anchors` is int64 `[R]`."""
        raise NotImplementedError

    def step(self, block: Any, slot: int, previous: Tensor, *, confidence: bool) -> Step:
        """Slot `slot` (from 0) of the blocks, given the token before it, int64 `[R]`: called for 0, 1, ... in order."""
        raise NotImplementedError

    @property
    def deepest(self) -> int:
        """Tokens of the longest path of a tree that this network can draft; see `branch`."""
        return self.block

    @property
    def known_tokens(self) -> int:
        """Vd, tokens that it can propose."""
        return self.shape.vocab if self.vocabulary is None else self.vocabulary.shape[0]

    def fitting_tree(self, tree: Tree) -> Tree | None:
        """What it can draft of a tree; None for nothing."""
        return tree.within(depth=self.deepest, children=self.known_tokens)

    def check_tree(self, tree: Tree) -> None:
        """Refuse a tree that it cannot draft.

        Raises:
            ValueError: too deep, or more tokens after one than it knows.
        """
        if self.fitting_tree(tree) != tree:
            raise ValueError(
                f"a tree of {tree.drafted_depth} levels and up to {tree.most_children} tokens after one; the draft "
                f"goes on to {self.deepest} tokens and knows {self.known_tokens}"
            )

    def begin_tree(self, anchors: Tensor, cache: TreeContext, depth: int) -> Any:
        """As `begin_block`, for trees of so many levels."""
        return self.begin_block(anchors, cache)

    def branch(self, block: Any, level: Level, previous: Tensor) -> Tensor:
        """Rows for the tokens after several of one depth, each given those on its own way: called level by level.

        Args:
            block: of `begin_tree`.
            level: which of them.
            previous: int64 `[R, count]`, these tokens.

        Returns:
            `[R, count, Vd]`, as `Step.logits`.
        """
        raise NotImplementedError


class SlotHead(nn.Module):
    """Base logits plus, for heads that look at the previous token, a low-rank bias.

    Slot states are `[h ; z ; ...]`: h of width D goes through the target's head, z of width r through `expand`; what
    follows is not for this head.
    """

    def __init__(self, network: FeatureNetwork, expand: nn.Linear | None = None) -> None:
        super().__init__()
        self._network = (network,)
        self.expand = expand

    def forward(self, states: Tensor) -> Tensor:
        """`[n, S]` to `[n, Vd]`."""
        (network,) = self._network
        width = network.shape.hidden
        logits = network.base_logits(states[..., :width])
        if self.expand is None:
            return logits
        bias: Tensor = self.expand(states[..., width : width + self.expand.in_features])
        return logits + bias


def make_network(
    config: FeatureDraftConfig, target: CausalModel, vocabulary: Tensor | None, *, seed: int
) -> FeatureNetwork:
    """A new network for a target, initialised as its settings say, bound, and on the target's device.

    Raises:
        InputError: taps the target does not have.
    """
    shape, config = DraftShape.of(target.model.config), config.for_target(target)
    taps = config.tapped_layers(shape.target_layers)
    check_taps(taps, shape.target_layers, where=f"draft.{config.kind}.taps")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = config.build(shape, taps, vocabulary)
    network.to(target.device)
    network.bind(target, copy_head=True)
    if config.init == "target":
        network.init_from(target)
    return network
