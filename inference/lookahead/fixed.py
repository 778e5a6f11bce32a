"""Propose the same number of tokens every round."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.lookahead import BlockConfig, Lookahead, Measured, SteadyLookahead

if TYPE_CHECKING:
    from inference.trees import Tree


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A fixed block; see also `BlockConfig`.

    Attributes:
        kind: this policy.
    """

    kind: str = "fixed"

    def build(self, tokens: int, siblings: Sequence[int] = (), measured: Measured | None = None) -> "FixedLookahead":
        """See `BlockConfig.build`."""
        return FixedLookahead(tokens, siblings=siblings)


class FixedLookahead(SteadyLookahead):
    """Keeps positions 1..tokens.

    Args:
        tokens: of the chain.
        siblings: see `Lookahead.siblings`.
        tree: what greedy captured rounds propose in place of the chain; nothing else knows of it.
        tree_when_sampled: whether sampled captured rounds propose it too.

    Raises:
        ValueError: `tree_when_sampled` without a tree.
    """

    def __init__(
        self,
        tokens: int,
        *,
        siblings: Sequence[int] = (),
        tree: "Tree | None" = None,
        tree_when_sampled: bool = False,
    ) -> None:
        super().__init__(tokens, siblings=siblings)
        if tree_when_sampled and tree is None:
            raise ValueError("tree_when_sampled needs a tree")
        self.tree, self.tree_when_sampled = tree, tree_when_sampled


def tree_of(lookahead: Lookahead) -> "Tree | None":
    """The tree of captured rounds under a policy, greedy ones at least, if it has one."""
    return lookahead.tree if isinstance(lookahead, FixedLookahead) else None


def tree_when_sampled(lookahead: Lookahead) -> bool:
    """Whether sampled captured rounds under a policy propose its tree."""
    return isinstance(lookahead, FixedLookahead) and lookahead.tree_when_sampled
