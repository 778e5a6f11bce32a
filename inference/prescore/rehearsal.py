"""A fixed response, the table of what a draft makes of it, and the walk over that table; see `inference.prescore`.

Knows no model: drafts fill the table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from inference.sampling_settings import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class FixedResponse:
    """What the target wrote after a prompt.

    Attributes:
        prompt_id: of the prompt.
        domain: of the prompt.
        tokens: int64 `[T]` on the CPU, the prompt and the n tokens of the response.
        first: index of the response's first token.
        budget: tokens the response might have had.
        settings: how it was written.
        taps: target layers whose outputs are kept.
        features: `[T - 1, m * D]` on the CPU, their outputs for every token but the last.
        target_probs: fp64 `[n]` on the CPU, the target's p of each token of the response; None at temperature 0.
    """

    prompt_id: str
    domain: str
    tokens: Tensor
    first: int
    budget: int
    settings: SamplingSettings
    taps: tuple[int, ...]
    features: Tensor
    target_probs: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the response, n."""
        return self.tokens.shape[0] - self.first

    @property
    def answer(self) -> Tensor:
        """The response alone, int64 `[n]`."""
        return self.tokens[self.first :]

    def context(self, anchor: int) -> Tensor:
        """Prompt and response up to an anchor, which is the token before token `anchor` of the response (from 0)."""
        return self.tokens[: self.first + anchor]

    def features_of(self, taps: Sequence[int]) -> Tensor:
        """Features `[T - 1, len(taps) * D]` of some of the tapped layers, in their order."""
        width = self.features.shape[1] // max(1, len(self.taps))
        places = [self.taps.index(tap) * width for tap in taps]
        return torch.cat([self.features[:, start : start + width] for start in places], dim=1)


@dataclass(frozen=True)
class Expected:
    """What decoding a fixed response is expected to take.

    Attributes:
        tokens: of the response.
        passes: of the target.
        rounds: by tokens proposed.
    """

    tokens: int
    passes: float
    rounds: dict[int, float]


class Rehearsal(Protocol):
    """A draft on a fixed response."""

    def expected(self, tokens: int, *, siblings: Sequence[int] = ()) -> Expected:
        """What decoding takes with blocks of `tokens` tokens, no more than were rehearsed, and siblings beside the
        first positions; above temperature 0 siblings are left out."""
        ...


@runtime_checkable
class Rehearses(Protocol):
    """What a drafter has besides when its expected acceptance on a fixed response can be told without decoding."""

    def rehearse(self, response: FixedResponse, *, longest: int) -> Rehearsal | None:
        """Go through a response with blocks of up to `longest` tokens; None for a draft whose inner one cannot.

        Nothing that a request under way rests on is touched.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Table:
    """A `Rehearsal` of a draft that proposes the same after the same tokens, however decoding got there.

    Attributes:
        chances: fp64 `[n, G]`, the chance that slot k after an anchor stands given that all before it do.
        proposed: for each anchor, the most tokens the draft proposes there.
        budget: see `FixedResponse.budget`.
        ranks: int64 `[n, G]`, place of the response's token in the draft's row, 0 for its likeliest, -1 where it is
            not in it; None above temperature 0, and for drafts without rows.
    """

    chances: Tensor
    proposed: Sequence[int]
    budget: int
    ranks: Tensor | None = None

    def num_proposed(self, anchor: int, tokens: int) -> int:
        """Tokens proposed at an anchor in blocks of `tokens`."""
        return max(0, min(tokens, self.proposed[anchor], self.budget - anchor - 1))

    def outcomes(self, anchor: int, tokens: int, siblings: Sequence[int] = ()) -> Iterator[tuple[float, int]]:
        """Possible ends of a round at an anchor: chance, and tokens written; those behind the response's end among
        them."""
        reached = min(self.num_proposed(anchor, tokens), self.chances.shape[0] - anchor)
        survival = 1.0
        for slot, chance in enumerate(self.chances[anchor, :reached].tolist()):
            yield survival * (1.0 - chance), slot + (2 if self._sibling_stands(anchor, slot, siblings) else 1)
            survival *= chance
        yield survival, reached + 1

    def _sibling_stands(self, anchor: int, slot: int, siblings: Sequence[int]) -> bool:
        return self.ranks is not None and slot < len(siblings) and 0 < int(self.ranks[anchor, slot]) <= siblings[slot]

    def expected(self, tokens: int, *, siblings: Sequence[int] = ()) -> Expected:
        """See `Rehearsal.expected`."""
        length = self.chances.shape[0]
        visits = [1.0] + [0.0] * length
        rounds: dict[int, float] = {}
        for anchor in range(length):
            if visits[anchor]:
                proposed = self.num_proposed(anchor, tokens)
                rounds[proposed] = rounds.get(proposed, 0.0) + visits[anchor]
                for chance, written in self.outcomes(anchor, tokens, siblings):
                    visits[min(anchor + written, length)] += visits[anchor] * chance
        return Expected(length, sum(visits[:length]), rounds)


def table_of_rows(chances: Tensor, ranks: Tensor | None, *, proposed: Sequence[int], budget: int) -> Table:
    """The table of a draft whose row for a token depends on the tokens before it alone, wherever the block began.

    Args:
        chances: fp64 `[n]`, of each token of the response.
        ranks: int64 `[n]`; see `Table`.
        proposed: see `Table`.
        budget: see `Table`.
    """
    length = chances.shape[0]
    slots = torch.arange(length)[:, None] + torch.arange(max(proposed))
    inside = slots < length
    slots = slots.clamp(max=length - 1)
    return Table(
        chances=torch.where(inside, chances[slots], 0.0),
        proposed=proposed,
        budget=budget,
        ranks=None if ranks is None else torch.where(inside, ranks[slots], -1),
    )
