"""N-gram look-up: propose what followed the last occurrence of the current suffix. The control every draft must beat.

Source: prompt look-up decoding (Saxena 2023); Yang et al. 2023, LLMA.
"""

from pathlib import Path

import torch

from inference.drafters import LoadContext, Proposal
from inference.errors import InputError
from inference.lookahead import Lookahead, Signals, Visible
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.prescore.rehearsal import FixedResponse, Table
from inference.randomness import Source, TorchSource
from inference.sampling_settings import SamplingSettings


class LookupDrafter:
    """Keeps an index from n-gram to the position after its latest occurrence, extended as tokens are verified.

    The confidence of a match of length n is the share of tokens that came as matches of the same n said, earlier in
    this request and whoever proposed (Laplace-smoothed): known before any token of the block is looked at.
    """

    kind = "lookup"

    def __init__(self, settings: LookupSettings) -> None:
        self.settings = settings
        self._lengths = range(settings.longest, settings.shortest - 1, -1)
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._stood = {n: 0 for n in self._lengths}
        self._tried = {n: 0 for n in self._lengths}
        self._last: tuple[int, int] | None = None  # length of the latest match, and the position after it

    def begin(self, prompt: torch.Tensor) -> None:
        """See `Drafter.begin`."""
        self._clear()
        self._extend(prompt.tolist())

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`; tokens are point masses."""
        self._last = self._matched(context)
        if self._last is None:
            return Proposal(context[:0])
        length, start = self._last
        chance = self._chance(length)
        kept = 0
        while kept < min(limit, len(self._tokens) - start):
            signals = (Signals(confidence=chance),) * (kept + 1) if lookahead.reads else ()
            if not lookahead.keeps(Visible(kept + 1, signals)):
                break
            kept += 1
        return Proposal(context[start : start + kept])

    def chance(self, context: torch.Tensor) -> float:
        """Confidence of what `propose` would propose now; 0 where nothing matches."""
        self._last = self._matched(context)
        return self._chance(self._last[0]) if self._last else 0.0

    def rollback(self, num_accepted: int) -> None:
        """Nothing is cached beyond verified tokens, and they say all there is to learn."""

    def nbytes(self) -> int:
        """See `Drafter.nbytes`; the index is a few bytes a token and counted as nothing."""
        return 0

    def rehearse(self, response: FixedResponse, *, longest: int) -> Table:
        """See `Rehearses.rehearse`. What was written before decides, so the anchors are gone through once."""
        reader = LookupDrafter(self.settings)
        reader.begin(response.context(0))
        chances = torch.zeros(response.num_tokens, longest, dtype=torch.float64)
        policy, unused, proposed = FixedLookahead(longest), TorchSource.seeded(0), []
        for anchor in range(response.num_tokens):
            proposal = reader.propose(
                response.context(anchor), limit=longest, lookahead=policy, settings=response.settings, generator=unused
            )
            proposed.append(len(proposal))
            came = response.answer[anchor : anchor + len(proposal)]
            chances[anchor, : came.shape[0]] = (proposal.tokens[: came.shape[0]] == came).double()
        return Table(chances=chances, proposed=proposed, budget=response.budget)

    def _matched(self, context: torch.Tensor) -> tuple[int, int] | None:
        """Read what was verified since the last time, learn from it, and match anew."""
        new = context[len(self._tokens) :].tolist()
        if self._last is not None and new:
            length, start = self._last
            for said, came in zip(self._tokens[start:], new, strict=False):
                self._tried[length] += 1
                if said != came:
                    break
                self._stood[length] += 1
        self._extend(new)
        return self._match()

    def _extend(self, tokens: list[int]) -> None:
        """Append verified tokens; index every n-gram that now has a token after it."""
        for token in tokens:
            end = len(self._tokens)
            for length in self._lengths:
                if end >= length:
                    self._after[tuple(self._tokens[end - length : end])] = end
            self._tokens.append(token)

    def _chance(self, length: int) -> float:
        return (self._stood[length] + 1) / (self._tried[length] + 2)

    def _match(self) -> tuple[int, int] | None:
        """Longest suffix seen before: its length and the position after its latest earlier occurrence."""
        for length in self._lengths:
            start = self._after.get(tuple(self._tokens[-length:])) if len(self._tokens) >= length else None
            if start is not None:
                return length, start
        return None


def lookup_settings(spec: dict[str, object], *, where: Path) -> LookupSettings:
    """Settings out of a `draft.json`.

    Raises:
        InputError: they are missing or off.
    """
    try:
        return LookupSettings(longest=int(str(spec["longest"])), shortest=int(str(spec["shortest"])))
    except (KeyError, ValueError) as error:
        raise InputError(f"look-up settings are off: {error}", where=str(where), mend="build the draft again") from None


def load(spec: dict[str, object], context: LoadContext) -> LookupDrafter:
    """See `load_drafter`."""
    return LookupDrafter(lookup_settings(spec, where=context.folder))
