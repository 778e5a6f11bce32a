"""Look-up where the request's matches come true, another draft everywhere else: a match costs nothing.

A folder of this kind holds the other draft whole, in `draft/`. Which of the two proposes is decided before a block is
drawn and from earlier rounds alone, so every block is one drafter's own and the verification rule needs no change.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from inference.drafters import Drafter, LoadContext, Proposal, ReadsFeatures, load_drafter
from inference.drafters.lookup import LookupDrafter, lookup_settings
from inference.errors import InputError
from inference.lookahead import Lookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.prescore.rehearsal import Expected, FixedResponse, Rehearses, Table
from inference.randomness import Source, TorchSource
from inference.sampling_settings import SamplingSettings

INNER_FOLDER = "draft"
WALKS = 16
"""Walks of a rehearsal above temperature 0."""


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

    def rehearse(self, response: FixedResponse, *, longest: int) -> "MixedRehearsal | None":
        """See `Rehearses.rehearse`; None where the draft behind look-up has no table."""
        table = self.draft.rehearse(response, longest=longest) if isinstance(self.draft, Rehearses) else None
        if not isinstance(table, Table):
            return None
        return MixedRehearsal(self.lookup.settings, table, response, draft_tokens=self.draft_tokens)


def draft_limit(limit: int, draft_tokens: int) -> int:
    """Longest block of the draft behind look-up, where `draft_tokens` of 0 is no bound of its own."""
    return min(limit, draft_tokens) if draft_tokens else limit


class MixedRehearsal:
    """Look-up and a draft on a fixed response: whose turn it is depends on how its rounds came out, so it is walked.

    Exact at temperature 0. Above it, the mean over a fixed number of seeded walks whose rounds end by the draft's
    chances: unbiased, not exact.

    Args:
        settings: of look-up.
        table: of the draft.
        response: what was written.
        draft_tokens: see `MixedDrafter`.
    """

    def __init__(
        self, settings: LookupSettings, table: Table, response: FixedResponse, *, draft_tokens: int = 0
    ) -> None:
        self.settings, self.table, self.response, self.draft_tokens = settings, table, response, draft_tokens

    def expected(self, tokens: int, *, siblings: Sequence[int] = ()) -> Expected:
        """See `Rehearsal.expected`."""
        walks = 1 if self.response.settings.greedy else WALKS
        rounds: Counter[int] = Counter()
        for walk in range(walks):
            rounds.update(self._walked(tokens, siblings, random.Random(walk)))
        by_length = {length: count / walks for length, count in rounds.items()}
        return Expected(self.response.num_tokens, sum(by_length.values()), by_length)

    def _walked(self, tokens: int, siblings: Sequence[int], draw: random.Random) -> list[int]:
        """Tokens proposed in each round of one walk."""
        response, lookup = self.response, LookupDrafter(self.settings)
        turns, policy, unused = Turns(lookup), FixedLookahead(tokens), TorchSource.seeded(0)
        turns.begin(response.context(0))
        anchor, found = 0, []
        while anchor < response.num_tokens:
            context = response.context(anchor)
            if turns.of_lookup(context):
                limit = min(tokens, response.budget - anchor - 1)
                said = lookup.propose(
                    context, limit=limit, lookahead=policy, settings=response.settings, generator=unused
                ).tokens
                came = response.answer[anchor : anchor + said.shape[0]]
                written = 1 + int((said[: came.shape[0]] == came).long().cumprod(0).sum())
                found.append(said.shape[0])
            else:
                longest = draft_limit(tokens, self.draft_tokens)
                chances, ends = zip(*self.table.outcomes(anchor, longest, siblings), strict=True)
                [written] = draw.choices(ends, weights=chances)
                found.append(self.table.num_proposed(anchor, longest))
                turns.drafted(found[-1], context)
            anchor += written
        return found


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
