"""What stands of a round's proposals, in fixed shapes: the rules of `inference.verification`, the host not looking.

Every random decision is a uniform number handed in. Letters in shapes: B requests, G proposed tokens of a chain,
W tokens of a pass, V vocabulary, Vd the draft's, N and D nodes and depth of a tree.
"""

import torch
from torch import Tensor

from inference.randomness import drawn
from inference.trees import TreePlan


def accept_greedy(tokens: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a chain while it is the target's own choice.

    Args:
        tokens: int64 `[B, G]`.
        choices: int64 `[B, W]`, the target's likeliest tokens.

    Returns:
        Emitted tokens `[B, W]`, valid up to the one after those that stand, and how many stand, `[B]`.
    """
    return choices, (tokens == choices[:, :-1]).long().cumprod(1).sum(1)


def accept_tree(ids: Tensor, choices: Tensor, plan: TreePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the longest way of a tree that is the target's own choice.

    Args:
        ids: int64 `[B, W]`, anchor and nodes; of a node's children two may be the same token, and either may go on.
        choices: int64 `[B, W]`, the target's likeliest token after each.
        plan: of the tree.

    Returns:
        Emitted tokens `[B, D + 1]` and how many stand, as `accept_greedy`; and the way of the last that does, int64
        `[B, D + 1]`.
    """
    chosen = ids == choices.index_select(1, plan.parents)
    chosen[:, 0] = True
    stands = (chosen[:, None] | ~plan.above).all(-1)
    stood, last = (stands * plan.depths).max(-1)
    ways = plan.ways[last]
    return choices.gather(1, ways), stood, ways


def accept_sampled(
    tokens: Tensor,
    drafted: Tensor | None,
    probs: Tensor,
    *,
    accepting: Tensor,
    following: Tensor,
    vocabulary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keep a chain by rejection sampling, and draw the token after it.

    Args:
        tokens: int64 `[B, G]`.
        drafted: rows `[B, G, Vd]` they were sampled from; None without any.
        probs: `[B, W, V]`, the target's.
        accepting: uniform numbers `[B, G]`, none of which has drawn a token of the chain.
        following: `[B]`, for the token after those that stand.
        vocabulary: the draft's, sorted; None for the target's.

    Returns:
        As `accept_greedy`.
    """
    count, block = tokens.shape
    if drafted is None:
        return drawn(probs[:, 0], following)[:, None], tokens.new_zeros(count)
    own = tokens if vocabulary is None else torch.searchsorted(vocabulary, tokens)
    chance = probs[:, :block].gather(2, tokens[..., None])[..., 0] / drafted.gather(2, own[..., None])[..., 0]
    stood = (accepting < chance).long().cumprod(1).sum(1)
    row = _row_of(probs, stood)
    taken = _row_of(drafted, stood.clamp(max=block - 1)) * (stood < block)[:, None]
    left = row.clone()
    if vocabulary is None:
        left -= taken
    else:
        left[:, vocabulary] -= taken
    left.clamp_(min=0.0)
    token = drawn(torch.where(left.sum(-1, keepdim=True) > 0, left, row), following)
    positions = torch.arange(block + 1, device=tokens.device)
    padded = torch.cat([tokens, tokens[:, :1]], dim=1)
    return torch.where(positions < stood[:, None], padded, token[:, None]), stood


def _row_of(rows: Tensor, slots: Tensor) -> Tensor:
    """One row `[V]` of each request, `[B, V]`, of `[B, n, V]` by int64 `[B]`."""
    return rows.gather(1, slots[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]
