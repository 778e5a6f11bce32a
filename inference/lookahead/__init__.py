"""How many tokens to propose: one module per policy, asked position by position, left to right.

A policy is lossless only if it decides on position k from what was known before token k was sampled. That is a type
here: a policy sees `Visible` and nothing else, and a drafter asks it before it samples.
"""

from dataclasses import dataclass
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


class Lookahead(Protocol):
    """A policy.

    Attributes:
        max_tokens: no block is longer than this.
        needs_confidence: whether drafters must supply confidences.
    """

    max_tokens: int
    needs_confidence: bool

    def keeps(self, visible: Visible) -> bool:
        """Whether the position is proposed; the first refusal ends the block."""
        ...

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Told after every round what became of the block."""
        ...
