"""Look-up where the request's matches come true, another draft everywhere else: a match costs nothing.

A folder of this kind holds the other draft whole, in `draft/`. Which of the two proposes is decided before a block is
drawn and from earlier rounds alone, so every block is one drafter's own and the verification rule needs no change.
"""

from dataclasses import replace

import torch

from inference.drafters import Drafter, LoadContext, Proposal, ReadsFeatures, load_drafter
from inference.drafters.lookup import LookupDrafter, lookup_settings
from inference.errors import InputError
from inference.lookahead import Lookahead
from inference.randomness import Source
from inference.sampling import SamplingSettings

INNER_FOLDER = "draft"


class Turns:
    """Whose turn it is in one request: look-up's, where matches of the present one's length come true more often than
    the draft's tokens stand.

    How often: within this request and Laplace-smoothed, for both. Matches are watched in every round, so they earn
    their turn without costing one; the draft is known by its own rounds.

    Args:
        lookup: proposes where its record is better.
    """

    def __init__(self, lookup: LookupDrafter) -> None:
        self.lookup = lookup
        self._clear()

    def _clear(self) -> None:
        self._stood = self._tried = 0
        # Tokens of the latest block and of the context before it, where the draft proposed; else None.
        self._proposed: tuple[int, int] | None = None

    @property
    def draft_proposed(self) -> bool:
        """Whether the latest block was the draft's."""
        return self._proposed is not None

    def begin(self, prompt: torch.Tensor) -> None:
        """Start a request."""
        self._clear()
        self.lookup.begin(prompt)

    def of_lookup(self, context: torch.Tensor) -> bool:
        """Whether look-up proposes now, after `context`, int64 `[T]`."""
        if self._proposed is not None:
            # A sibling that stands counts, which `rollback` is not told of.
            tokens, before = self._proposed
            stood = context.shape[0] - before - 1
            self._stood += stood
            self._tried += max(stood, min(tokens, stood + 1))
        self._proposed = None
        return self.lookup.chance(context) > (self._stood + 1) / (self._tried + 2)

    def drafted(self, num_tokens: int, context: torch.Tensor) -> None:
        """The draft has proposed so many tokens after `context`."""
        self._proposed = (num_tokens, context.shape[0])


class MixedDrafter:
    """Proposes from the latest match where it is look-up's turn (`Turns`).

    A match that stands is likely to go on and costs nothing, so it may fill a long block; the draft's own blocks may be
    kept shorter.

    Args:
        lookup: proposes where its record is better.
        draft: proposes elsewhere.
        draft_tokens: longest block of the draft; 0 for as many as asked for.
    """

    kind = "mixed"

    def __init__(self, lookup: LookupDrafter, draft: Drafter, *, draft_tokens: int = 0) -> None:
        self.turns, self.draft, self.draft_tokens = Turns(lookup), draft, draft_tokens

    @property
    def lookup(self) -> LookupDrafter:
        """The look-up in front."""
        return self.turns.lookup

    def begin(self, prompt: torch.Tensor) -> None:
        """See `Drafter.begin`."""
        self.turns.begin(prompt)
        self.draft.begin(prompt)

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`."""
        by_lookup = self.turns.of_lookup(context)
        chosen: Drafter = self.lookup if by_lookup else self.draft
        limit = limit if by_lookup else draft_limit(limit, self.draft_tokens)
        proposal = chosen.propose(context, limit=limit, lookahead=lookahead, settings=settings, generator=generator)
        if not by_lookup:
            self.turns.drafted(len(proposal), context)
        return proposal

    def rollback(self, num_accepted: int) -> None:
        """Tell the draft if it proposed; look-up has nothing to forget."""
        if self.turns.draft_proposed:
            self.draft.rollback(num_accepted)

    def nbytes(self) -> int:
        """See `Drafter.nbytes`."""
        return self.draft.nbytes()


def draft_limit(limit: int, draft_tokens: int) -> int:
    """Longest block of the draft behind look-up, where `draft_tokens` of 0 is no bound of its own."""
    return min(limit, draft_tokens) if draft_tokens else limit


class MixedFeatureDrafter(MixedDrafter):
    """The same around a draft that reads the target's features; it reads them in every round, whoever proposed.

    Attributes:
        taps: target layers whose outputs it reads.
    """

    def __init__(self, lookup: LookupDrafter, draft: Drafter, *, draft_tokens: int = 0) -> None:
        super().__init__(lookup, draft, draft_tokens=draft_tokens)
        assert isinstance(draft, ReadsFeatures)
        self._reader: ReadsFeatures = draft
        self.taps = draft.taps

    def read(self, features: torch.Tensor) -> None:
        """See `ReadsFeatures.read`."""
        self._reader.read(features)


def mixed_drafter(lookup: LookupDrafter, draft: Drafter, *, draft_tokens: int = 0) -> MixedDrafter:
    """Look-up and a draft of any kind."""
    kind = MixedFeatureDrafter if isinstance(draft, ReadsFeatures) else MixedDrafter
    return kind(lookup, draft, draft_tokens=draft_tokens)


def load(spec: dict[str, object], context: LoadContext) -> MixedDrafter:
    """See `load_drafter`."""
    settings = lookup_settings(spec, where=context.folder)
    draft_tokens = spec.get("draft_tokens", 0)
    if not isinstance(draft_tokens, int) or draft_tokens < 0:
        raise InputError(f"draft_tokens is {draft_tokens!r}", where=str(context.folder), mend="build the draft again")
    draft = load_drafter(replace(context, folder=context.folder / INNER_FOLDER))
    return mixed_drafter(LookupDrafter(settings), draft, draft_tokens=draft_tokens)
