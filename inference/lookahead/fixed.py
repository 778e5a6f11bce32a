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
    """

    def __init__(self, tokens: int, *, siblings: Sequence[int] = (), tree: "Tree | None" = None) -> None:
        super().__init__(tokens, siblings=siblings)
        self.tree = tree


def tree_of(lookahead: Lookahead) -> "Tree | None":
    """The tree of greedy captured rounds under a policy, if it has one."""
    return lookahead.tree if isinstance(lookahead, FixedLookahead) else None
