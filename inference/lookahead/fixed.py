"""Propose the same number of tokens every round."""

from collections.abc import Sequence
from dataclasses import dataclass

from inference.lookahead import BlockConfig, Measured, SteadyLookahead


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
    """Keeps positions 1..tokens."""
