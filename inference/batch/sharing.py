"""How much the requests of one pass draft and verify: DSpark's scheduler over all of them, by costs under load.

Three decisions, none of which knows a token that it decides on:

- how deep a block is drafted, from survivals of earlier rounds;
- `early_stop`: positions of this round are admitted, likeliest first, while expected tokens a second rise
  (`inference.scheduler`);
- `whole`: positions whose survival is at least a bound that was best, over all lengths, in rounds at least
  `delay_rounds` before.

Where no depth pays, nothing is drafted, and now and then it is tried again.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from inference.batch.costs import LoadCosts
from inference.lookahead import Chances, Signals, SteadyLookahead, Visible
from inference.lookahead.scheduled import DelayedLookahead, ScheduledLookahead
from inference.scheduler import schedule

_SAMPLE_ROUNDS = 24
_SAMPLE_REQUESTS = 256
_PLAN_ROUNDS = 8
_FIRST_PROBE, _LAST_PROBE = 8, 128


class Noting(SteadyLookahead):
    """Lets blocks be drafted up to a length and keeps what was known of each position."""

    def __init__(self, tokens: int, *, reads: frozenset[str]) -> None:
        super().__init__(tokens)
        self.reads = reads
        self.signals: tuple[Signals, ...] = ()

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        self.signals = visible.signals
        return super().keeps(visible)


class PassSharing:
    """Decides for all requests of an engine.

    Args:
        lookahead: the policy as it would be for one request: its block, chances, and form of the search.
        costs: of rounds, on this device.
    """

    def __init__(self, lookahead: ScheduledLookahead | DelayedLookahead, costs: LoadCosts) -> None:
        self.longest = lookahead.longest
        self.costs = costs
        # Age of the rounds that `whole` goes by, at least 2; 0 for `early_stop`.
        self._delay_rounds = lookahead.delay_rounds if isinstance(lookahead, DelayedLookahead) else 0
        self._chances: Chances = lookahead.measured.chances
        known = lookahead.measured.conditional or (0.5,)
        self._conditional = [known[min(k, len(known) - 1)] for k in range(self.longest)]
        self._rounds: deque[list[list[float]]] = deque(maxlen=_SAMPLE_ROUNDS)
        self._plan: tuple[int, float] = (self.longest, 0.0)
        self._planned_for = 0
        self._age = self._silent = 0
        self._probe = _FIRST_PROBE

    def depth(self, requests: int) -> int:
        """Tokens that each of so many requests drafts in the coming round."""
        if requests != self._planned_for or self._age >= _PLAN_ROUNDS:
            self._plan, self._planned_for, self._age = self._best(requests), requests, 0
        self._age += 1
        depth = self._plan[0]
        if depth:
            self._silent, self._probe = 0, _FIRST_PROBE
            return depth
        self._silent += 1
        if self._silent < self._probe:
            return 0
        self._silent, self._probe = 0, min(2 * self._probe, _LAST_PROBE)
        return 1

    def policies(self, depth: int, requests: int) -> list[Noting]:
        """What drafts are asked by, one for each request."""
        return [Noting(depth, reads=self._chances.reads) for _ in range(requests)]

    def admit(self, noted: Sequence[Noting], lengths: Sequence[int]) -> list[int]:
        """How much of each drafted block is verified.

        Args:
            noted: what was known of the blocks' positions.
            lengths: tokens drafted, by request.
        """
        survivals = [_survivals(self._chances.of(n.signals[:length])) for n, length in zip(noted, lengths, strict=True)]
        count = len(survivals)
        if self._delay_rounds:
            admitted = [sum(chance >= self._plan[1] for chance in row) for row in survivals]
        else:
            prefixes = [_Prefix(row) for row in survivals]
            admitted = schedule(prefixes, lambda width: self.costs.pass_seconds(count, width))
        if any(lengths):
            self._learn(survivals)
        return admitted

    def _learn(self, survivals: list[list[float]]) -> None:
        """Remember this round for later ones."""
        self._rounds.append(survivals)
        for position in range(self.longest):
            ratios = [
                row[position] / (row[position - 1] if position else 1.0)
                for row in survivals
                if len(row) > position and (not position or row[position - 1] > 0.0)
            ]
            if ratios:
                mean = sum(ratios) / len(ratios)
                self._conditional[position] += 0.1 * (mean - self._conditional[position])

    def _best(self, requests: int) -> tuple[int, float]:
        """The depth, and the bound on survivals, with the most expected tokens a second in earlier rounds."""
        old = list(self._rounds)[: 1 - self._delay_rounds] if self._delay_rounds else list(self._rounds)
        sample = [row for survivals in old for row in survivals][-_SAMPLE_REQUESTS:] or [[]]
        known = np.array([self._lengthened(row) for row in sample])
        # Passes by tokens a request, as `np.interp` wants them.
        each = np.arange(1, 2 + self.longest)
        passes = np.array([self.costs.pass_seconds(requests, requests * width) for width in each.tolist()])
        best, bound, rate = 0, 1.0, requests / float(passes[0])
        for depth in range(1, self.longest + 1):
            ordered = np.sort(known[:, :depth], axis=None)[::-1]
            verified = 1.0 + np.arange(1, ordered.size + 1) / len(sample)
            tokens = requests * (1.0 + ordered.cumsum() / len(sample))
            seconds = self.costs.draft_seconds(requests, depth) + np.interp(verified, each, passes)
            index = int((tokens / seconds).argmax())
            if tokens[index] / seconds[index] > rate:
                best, bound, rate = depth, float(ordered[index]), float(tokens[index] / seconds[index])
        return best, bound

    def _lengthened(self, survivals: list[float]) -> list[float]:
        """Survivals of all positions: those that were not drafted, as such positions went on the whole."""
        row = survivals[: self.longest]
        while len(row) < self.longest:
            row = [*row, (row[-1] if row else 1.0) * self._conditional[len(row)]]
        return row


class _Prefix:
    """One request's block as `schedule` sees it: a position at a time."""

    def __init__(self, survivals: Sequence[float]) -> None:
        self._survivals, self._admitted = survivals, 0

    def survival(self) -> float | None:
        """See `inference.scheduler.Prefix`."""
        return self._survivals[self._admitted] if self._admitted < len(self._survivals) else None

    def admit(self) -> None:
        """See `inference.scheduler.Prefix`."""
        self._admitted += 1


def _survivals(conditional: Sequence[float]) -> list[float]:
    """Running products."""
    found, survival = [], 1.0
    for chance in conditional:
        survival *= chance
        found.append(survival)
    return found
