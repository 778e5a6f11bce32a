"""Propose the same number of tokens every round."""

from collections.abc import Sequence
from dataclasses import dataclass

from inference.lookahead import BlockConfig, Visible


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A fixed block; see also `BlockConfig`.

    Attributes:
        kind: this policy.
    """

    kind: str = "fixed"

    def build(self, tokens: int, siblings: Sequence[int] = ()) -> "FixedLookahead":
        """See `BlockConfig.build`."""
        return FixedLookahead(tokens, siblings=siblings)


class FixedLookahead:
    """Keeps positions 1..tokens."""

    needs_confidence = False

    def __init__(self, tokens: int, *, siblings: Sequence[int] = ()) -> None:
        self.max_tokens = tokens
        self.siblings = tuple(siblings)

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        return visible.position <= self.max_tokens

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Nothing is learnt."""
