"""What a captured round proposes: a chain or a tree of the draft's tokens, greedy or sampled, and copied ones.

Letters in shapes: B requests, G tokens of a chain, N nodes and D depth of a tree, V vocabulary, Vd the draft's.
"""

import torch
from torch import Tensor

from inference.drafters._token import signal_values
from inference.feature_networks import FeatureNetwork
from inference.graphed.contexts import StaticContext
from inference.graphed.likeliest import likeliest
from inference.graphed.written import Written
from inference.randomness import drawn
from inference.sampling import process_logits
from inference.sampling_settings import SamplingSettings
from inference.trees import TreePlan

SIGNALS = ("confidence", "margin")
"""What recorded rounds note of each proposed token; see `inference.lookahead.Signals`."""


class Proposer:
    """A draft in fixed shapes.

    Args:
        network: drafts.
        context: what it has read of each request.
        truncation: top-k and top-p of sampled rounds.
    """

    def __init__(self, network: FeatureNetwork, context: StaticContext, truncation: SamplingSettings) -> None:
        self._network, self._context, self._truncation = network, context, truncation

    def chain(
        self,
        anchors: Tensor,
        length: int,
        *,
        shown: int,
        temperatures: Tensor | None,
        uniforms: Tensor,
        signals: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One token after another.

        Args:
            anchors: int64 `[B]`.
            length: G, at least 1.
            shown: positions that are read.
            temperatures: fp32 `[B]`; None for the likeliest tokens.
            uniforms: fp64 `[B, G]`, each draws a token.
            signals: fp64 `[B, G, 2]`, where `SIGNALS` are noted; None for not at all.

        Returns:
            int64 `[B, G]`, and the rows `[B, Vd]` they were drawn from.
        """
        network, context, previous = self._network, self._context, anchors
        context.shown = shown
        context.drafting(anchors.shape[0])
        block = network.begin_block(anchors, context)
        tokens, rows = [], []
        for slot in range(length):
            step = network.step(block, slot, previous, confidence=signals is not None)
            if temperatures is None:
                row, index = step.logits, step.logits.argmax(-1)
            else:
                row = processed(step.logits, temperatures[:, None], self._truncation)
                rows.append(torch.softmax(row, dim=-1))
                index = drawn(rows[-1], uniforms[:, slot])
            if signals is not None:
                drawn_from = None if temperatures is None else rows[-1]
                values = signal_values(row.float(), drawn_from, step.confidence, reads=frozenset(SIGNALS))
                signals[:, slot].copy_(torch.stack([values[name].double() for name in SIGNALS], dim=-1))
            previous = index if network.vocabulary is None else network.vocabulary[index]
            tokens.append(previous)
        return torch.stack(tokens, dim=1), rows

    def tree(
        self,
        plan: TreePlan,
        anchors: Tensor,
        lengths: Tensor,
        *,
        shown: int,
        temperatures: Tensor | None,
        noise: Tensor | None,
        written: Written | None,
    ) -> Tensor:
        """The nodes of a tree.

        Args:
            plan: of it.
            anchors: int64 `[B]`.
            lengths: int64 `[B]`, tokens before them.
            shown: positions that are read.
            temperatures: fp32 `[B]`; None without noise.
            noise: logarithms, fp32 `[B, D + 1, V]`; None for the likeliest tokens.
            written: what is copied from; None where nothing is.

        Returns:
            int64 `[B, N]`, the drafted ones by depth, then the copied ones.
        """
        network, context, tokens = self._network, self._context, anchors[:, None]
        context.shown = shown
        context.drafting(anchors.shape[0])
        context.branching()
        block = network.begin_tree(anchors, context, plan.tree.drafted_depth)
        if noise is not None and network.vocabulary is not None:
            noise = noise[:, :, network.vocabulary]
        levels = []
        for level in plan.levels:
            inner = tokens if level.among is None else tokens.index_select(1, level.among)
            rows = network.branch(block, level, inner)
            if noise is not None and temperatures is not None:
                rows = processed(rows, temperatures[:, None, None], self._truncation) - noise[:, level.depth, None]
            index = likeliest(rows, level.children).flatten(1)
            if level.taken is not None:
                index = index.index_select(1, level.taken)
            tokens = index if network.vocabulary is None else network.vocabulary[index]
            levels.append(tokens)
        if written is not None:
            levels.append(written.copied(lengths, shown=shown, count=plan.tree.lookup))
        return torch.cat(levels, dim=1)


def processed(logits: Tensor, temperatures: Tensor, truncation: SamplingSettings) -> Tensor:
    """Logits whose softmax is sampled from, `[..., V]`, target's and draft's alike.

    Args:
        logits: `[..., V]`.
        temperatures: with as many axes.
        truncation: whose top-k and top-p cut them.
    """
    scaled = logits.float() / temperatures
    if truncation.top_k or truncation.top_p < 1.0:
        rows, none = scaled.flatten(0, -2), torch.empty(0, dtype=torch.long, device=logits.device)
        scaled = process_logits(rows, context=none, block=none, settings=truncation).view_as(scaled)
    return scaled
