"""Propose nothing: target-only decoding through the same loop, the baseline of every comparison."""

import torch

from inference.drafters import LoadContext, Proposal
from inference.lookahead import Lookahead
from inference.prescore.rehearsal import FixedResponse, Table
from inference.randomness import Source
from inference.sampling_settings import SamplingSettings


class NoDrafter:
    """A drafter with nothing to say; each round is one target pass over the anchor alone."""

    kind = "none"
    _empty = Proposal(torch.empty(0, dtype=torch.long))

    def begin(self, prompt: torch.Tensor) -> None:
        """See `Drafter.begin`."""
        self._empty = Proposal(torch.empty(0, dtype=torch.long, device=prompt.device))

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`; always empty."""
        return self._empty

    def rollback(self, num_accepted: int) -> None:
        """See `Drafter.rollback`."""

    def nbytes(self) -> int:
        """See `Drafter.nbytes`."""
        return 0

    def rehearse(self, response: FixedResponse, *, longest: int) -> Table:
        """See `Rehearses.rehearse`: a pass for every token."""
        length = response.num_tokens
        return Table(chances=torch.empty(length, 0, dtype=torch.float64), proposed=[0] * length, budget=response.budget)


def load(spec: dict[str, object], context: LoadContext) -> NoDrafter:
    """See `load_drafter`."""
    return NoDrafter()
