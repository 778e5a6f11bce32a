"""How many tokens to propose: one module per policy, asked position by position, left to right.

A policy is lossless only if it decides on position k from what was known before token k was sampled. That is a type
here: a policy sees `Visible` and nothing else, and a drafter asks it before it samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Visible:
    """All that a policy may look at when it decides whether position `position` is proposed.

    Attributes:
        position: 1-based position in the block.
        confidences: chances c_1..c_position that each token survives given the earlier ones, c_k computed before x_k
            was sampled; empty when the policy does not need them.
    """

    position: int
    confidences: tuple[float, ...]


@dataclass(kw_only=True)
class BlockConfig:
    """What every policy is told about the block, besides its own settings.

    Attributes:
        kind: name of the policy.
        tokens: longest block; 0 lets the score choose a length per draft, and the siblings with it, from acceptance and
            pass times it measures on validation prompts, and fixes both before the held-out prompts are touched.
        longest_auto: longest block that the automatic choice may take.
        siblings: tokens offered beside the one at each position, where `tokens` is set.
        siblings_auto: most of them beside one position that the automatic choice may take; 0 for chains alone.
    """

    kind: str
    tokens: int = 0
    longest_auto: int = 8
    siblings: list[int] = field(default_factory=list)
    siblings_auto: int = 3

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"lookahead.tokens is {self.tokens}; use 0 for the automatic choice or a positive length")
        if self.longest_auto < 1:
            raise ValueError(f"lookahead.longest_auto is {self.longest_auto}; use at least 1")
        if self.siblings_auto < 0 or any(count < 0 for count in self.siblings):
            raise ValueError("lookahead.siblings and lookahead.siblings_auto count tokens; use 0 or more")
        if self.siblings and not self.tokens:
            raise ValueError("lookahead.siblings needs a block length of your own; set lookahead.tokens as well")

    def build(self, tokens: int, siblings: Sequence[int] = ()) -> "Lookahead":
        """The policy, with the longest block and the siblings that were chosen for one draft."""
        raise NotImplementedError


class Lookahead(Protocol):
    """A policy.

    Attributes:
        max_tokens: no block is longer than this.
        siblings: how many tokens are offered beside the one at each position, from the first; fixed before the request,
            and 0 for positions beyond the last entry.
        needs_confidence: whether drafters must supply confidences.
    """

    max_tokens: int
    siblings: tuple[int, ...]
    needs_confidence: bool

    def keeps(self, visible: Visible) -> bool:
        """Whether the position is proposed; the first refusal ends the block."""
        ...

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Told after every round what became of the block."""
        ...
