"""What is asked of a decoder and what one request gave: plain data. The decoding itself is `inference.decoder`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inference.sampling_settings import SamplingSettings

if TYPE_CHECKING:
    from inference.drafters import Proposal
    from inference.verification import Verdict

PARTS = ("prefill", "draft", "verify", "accept", "cache", "other")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the decoder.

    Attributes:
        settings: how tokens are drawn.
        max_new_tokens: longest answer, in tokens.
        stop_tokens: any of these ends the answer and is part of it.
    """

    settings: SamplingSettings
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; use at least 1")


def tree_tokens(blocks: Mapping[int, int], *, depth: int) -> int:
    """Tokens of the tree that the rounds of a request proposed; 0 where they proposed chains, which have as many
    positions as tokens.

    Args:
        blocks: see `Decoded`.
        depth: positions counted.
    """
    widest = max(blocks, default=0)
    return widest if widest > depth else 0


@dataclass
class Decoded:
    """What one request gave.

    Attributes:
        tokens: emitted token ids, a stop token included.
        passes: target passes after the prefill, one a round.
        proposed: proposed[k] = rounds that verified a token at position k + 1, siblings apart; of trees, rounds that
            came to that depth.
        accepted: accepted[k] = rounds in which that token, or one of that depth, stood.
        siblings: siblings[k][r] = rounds in which the sibling of rank r stood in its place.
        seconds: by part, see `PARTS`.
        blocks: blocks[l] = rounds that proposed l tokens, in a chain or a tree.
        cache_nbytes: bytes of the target's cache at the end, its largest.
    """

    tokens: list[int] = field(default_factory=list)
    passes: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    siblings: list[list[int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    blocks: dict[int, int] = field(default_factory=dict)
    cache_nbytes: int = 0

    @property
    def tau(self) -> float:
        """Emitted tokens per target pass, bonus included (method section 1)."""
        return len(self.tokens) / self.passes

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds, prefill included."""
        return sum(self.seconds.values())

    def count(self, proposal: "Proposal", verdict: "Verdict") -> None:
        """Add one round. A position counts as verified only while all before it were accepted."""
        self.count_chain(len(proposal), verdict.num_accepted)
        if verdict.sibling is not None:
            num_accepted = verdict.num_accepted
            rank = verdict.sibling - proposal.slots.index(num_accepted)
            while len(self.siblings) <= num_accepted:
                self.siblings.append([])
            ranks = self.siblings[num_accepted]
            ranks += [0] * (rank + 1 - len(ranks))
            ranks[rank] += 1

    def count_chain(self, num_proposed: int, num_accepted: int) -> None:
        """Add one round of a chain alone."""
        self._count(num_proposed, num_proposed, num_accepted)

    def count_tree(self, size: int, depth: int, num_accepted: int) -> None:
        """Add one round of a tree of so many nodes and levels, of which so many levels stood."""
        self._count(size, depth, num_accepted)

    def _count(self, num_proposed: int, depth: int, num_accepted: int) -> None:
        self.passes += 1
        self.blocks[num_proposed] = self.blocks.get(num_proposed, 0) + 1
        while len(self.proposed) < depth:
            self.proposed.append(0)
            self.accepted.append(0)
        for position in range(min(depth, num_accepted + 1)):
            self.proposed[position] += 1
            self.accepted[position] += position < num_accepted
