"""Propose the same number of tokens every round."""

from dataclasses import dataclass

from inference.lookahead import Visible


@dataclass(kw_only=True)
class Config:
    """A fixed block length.

    Attributes:
        kind: this policy.
        tokens: proposed tokens a round; 0 lets the score choose a length per draft from acceptance and pass times it
            measures on validation prompts, and fixes that length before the held-out prompts are touched.
        longest_auto: longest block that the automatic choice may take.
    """

    kind: str = "fixed"
    tokens: int = 0
    longest_auto: int = 8

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"lookahead.tokens is {self.tokens}; use 0 for the automatic choice or a positive length")
        if self.longest_auto < 1:
            raise ValueError(f"lookahead.longest_auto is {self.longest_auto}; use at least 1")

    def build(self, tokens: int) -> "FixedLookahead":
        """The policy, with the length that was chosen for one draft."""
        return FixedLookahead(tokens)


class FixedLookahead:
    """Keeps positions 1..tokens."""

    needs_confidence = False

    def __init__(self, tokens: int) -> None:
        self.max_tokens = tokens

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        return visible.position <= self.max_tokens

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Nothing is learnt."""
