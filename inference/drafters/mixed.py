"""Look-up where the context repeats itself, another draft everywhere else: a match costs nothing, so it goes first.

A folder of this kind holds the other draft whole, in `draft/`. Which of the two proposes is decided before a block is
drawn and from earlier rounds alone, so every block is one drafter's own and the verification rule needs no change.
"""

import torch

from inference.drafters import Drafter, LoadContext, Proposal, ReadsFeatures, load_drafter
from inference.drafters.lookup import LookupDrafter, lookup_settings
from inference.lookahead import Lookahead
from inference.randomness import Source
from inference.sampling import SamplingSettings

INNER_FOLDER = "draft"


class MixedDrafter:
    """Proposes from the latest match as long as matches of its length have stood at least as often as the draft.

    How often: the share of proposed tokens that stood in earlier rounds of this request, Laplace-smoothed, for both.

    Args:
        lookup: proposes where its record is at least as good.
        draft: proposes elsewhere.
    """

    kind = "mixed"

    def __init__(self, lookup: LookupDrafter, draft: Drafter) -> None:
        self.lookup, self.draft = lookup, draft
        self._clear()

    def _clear(self) -> None:
        self._stood = self._tried = 0
        self._proposed: int | None = None  # tokens of a block of the draft's; None for a match

    def begin(self, prompt: torch.Tensor) -> None:
        """See `Drafter.begin`."""
        self._clear()
        self.lookup.begin(prompt)
        self.draft.begin(prompt)

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`."""
        chosen: Drafter = self.draft
        if self.lookup.chance(context) >= (self._stood + 1) / (self._tried + 2):
            chosen = self.lookup
        proposal = chosen.propose(context, limit=limit, lookahead=lookahead, settings=settings, generator=generator)
        self._proposed = None if chosen is self.lookup else len(proposal)
        return proposal

    def rollback(self, num_accepted: int) -> None:
        """Tell whichever proposed; the other has nothing to forget."""
        if self._proposed is None:
            self.lookup.rollback(num_accepted)
        else:
            self.draft.rollback(num_accepted)
            self._stood += num_accepted
            self._tried += min(self._proposed, num_accepted + 1)

    def nbytes(self) -> int:
        """See `Drafter.nbytes`."""
        return self.draft.nbytes()


class MixedFeatureDrafter(MixedDrafter):
    """The same around a draft that reads the target's features; it reads them in every round, whoever proposed.

    Attributes:
        taps: target layers whose outputs it reads.
    """

    def __init__(self, lookup: LookupDrafter, draft: Drafter) -> None:
        super().__init__(lookup, draft)
        assert isinstance(draft, ReadsFeatures)
        self._reader: ReadsFeatures = draft
        self.taps = draft.taps

    def read(self, features: torch.Tensor) -> None:
        """See `ReadsFeatures.read`."""
        self._reader.read(features)


def mixed_drafter(lookup: LookupDrafter, draft: Drafter) -> MixedDrafter:
    """Look-up and a draft of any kind."""
    return (MixedFeatureDrafter if isinstance(draft, ReadsFeatures) else MixedDrafter)(lookup, draft)


def load(spec: dict[str, object], context: LoadContext) -> MixedDrafter:
    """See `load_drafter`."""
    settings = lookup_settings(spec, where=context.folder)
    draft = load_drafter(LoadContext(**{**context.__dict__, "folder": context.folder / INNER_FOLDER}))
    return mixed_drafter(LookupDrafter(settings), draft)
