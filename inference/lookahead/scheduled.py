"""DSpark's prefix scheduler: a position is verified while it raises expected tokens a second on this machine.

Source: DSpark (Cheng et al. 2026), method section 3. Two forms, both lossless at any temperature:

- early stop: position k is admitted while the prefix up to it pays, and the first that does not ends the block; whether
  it pays is known from c_1..c_k, before x_k is sampled;
- asynchronous (`delay_rounds` of 2 or more): the best of all lengths, by the confidences of an earlier round.

The best of all lengths by this round's own confidences would be better still, and wrong: c_{k+1} knows x_k. It is
refused.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from inference.lookahead import BlockConfig, Measured, SteadyLookahead, Visible
from inference.lookahead._worth import best_length, pays

SEARCHES = ("early_stop", "whole")
_FEWEST_ROUNDS = 2


@dataclass(kw_only=True)
class Config(BlockConfig):
    """The prefix scheduler; see also `BlockConfig`.

    Attributes:
        kind: this policy.
        tokens: longest block.
        search: `early_stop`, or `whole` for the best of all lengths.
        delay_rounds: age of the confidences that `whole` goes by, in rounds, at least 2; 0 for those of this round.
        patience_rounds: after so many rounds in a row that proposed nothing, drafting pauses for as many, and twice as
            many the next time, up to 64; 0 never pauses.
    """

    weighs_costs = True
    calibrates = True

    kind: str = "scheduled"
    tokens: int = 8
    search: str = "early_stop"
    delay_rounds: int = 0
    patience_rounds: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search not in SEARCHES:
            raise ValueError(f"lookahead.search is {self.search!r}; choose one of {', '.join(SEARCHES)}")
        if self.search == "whole" and self.delay_rounds < _FEWEST_ROUNDS:
            raise ValueError(
                "lookahead.search=whole looks ahead: a later confidence knows the token before it, which changes the "
                "output; use lookahead.delay_rounds=2 or more, or search=early_stop"
            )
        if self.search == "early_stop" and self.delay_rounds:
            raise ValueError("lookahead.delay_rounds goes with search=whole; early_stop needs no delay")
        if self.patience_rounds < 0:
            raise ValueError(f"lookahead.patience_rounds is {self.patience_rounds}; use 0 for never or a number")

    def build(
        self, tokens: int, siblings: Sequence[int] = (), measured: Measured | None = None
    ) -> "ScheduledLookahead | DelayedLookahead":
        """See `BlockConfig.build`."""
        known = self.need(measured)
        if self.search == "whole":
            return DelayedLookahead(tokens, known, delay_rounds=self.delay_rounds, siblings=siblings)
        return ScheduledLookahead(tokens, known, patience_rounds=self.patience_rounds, siblings=siblings)


class Pause:
    """Stops drafting for a while where it has brought nothing: a refused position has been drafted all the same.

    Looks at earlier rounds alone.
    """

    _LONGEST = 64

    def __init__(self, patience_rounds: int) -> None:
        self.patience_rounds = patience_rounds
        self._empty, self._left, self._next = 0, 0, patience_rounds

    @property
    def on(self) -> bool:
        """Whether the coming round drafts nothing."""
        return self._left > 0

    def observe(self, num_proposed: int) -> None:
        """Told after every round how much was proposed."""
        if self._left:
            self._left -= 1
        elif num_proposed:
            self._empty, self._next = 0, self.patience_rounds
        elif self.patience_rounds:
            self._empty += 1
            if self._empty >= self.patience_rounds:
                self._left, self._empty = self._next, 0
                self._next = min(2 * self._next, self._LONGEST)


class ScheduledLookahead(SteadyLookahead):
    """Admits positions while they pay. Subclasses may know better than the draft how likely a token is to stand."""

    def __init__(self, tokens: int, measured: Measured, *, patience_rounds: int, siblings: Sequence[int] = ()) -> None:
        super().__init__(tokens, siblings=siblings)
        self.measured = measured
        self.reads = measured.chances.reads
        self.pause = Pause(patience_rounds)

    def begin(self) -> "ScheduledLookahead":
        """A new request starts awake."""
        patience = self.pause.patience_rounds
        return ScheduledLookahead(self.longest, self.measured, patience_rounds=patience, siblings=self.siblings)

    def chances(self, visible: Visible) -> list[float]:
        """c_1..c_k of the positions so far."""
        return self.measured.chances.of(visible.signals)

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        if not super().keeps(visible):
            return False
        survivals, survival = [], 1.0
        for chance in self.chances(visible):
            survival *= chance
            survivals.append(survival)
        return pays(survivals, self.measured.costs, self.siblings)

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Only pauses depend on earlier rounds."""
        self.pause.observe(num_proposed)
        self.max_tokens = 0 if self.pause.on else self.longest


class DelayedLookahead(SteadyLookahead):
    """The best of all lengths by the confidences of an earlier round; validation's until there is one.

    A round tells the confidences of what it drafted; for later positions the ones before are kept. Where that says to
    propose nothing, one token is tried every 16 rounds, since nothing else would ever bring other confidences.
    """

    _PROBE_ROUNDS = 16

    reads = frozenset({"confidence"})

    def __init__(self, tokens: int, measured: Measured, *, delay_rounds: int, siblings: Sequence[int] = ()) -> None:
        super().__init__(tokens, siblings=siblings)
        self.measured, self.delay_rounds = measured, delay_rounds
        self.reads = measured.chances.reads
        known = measured.conditional or (0.5,)
        start = [known[min(k, len(known) - 1)] for k in range(tokens)]
        self._latest = start
        self._past: deque[list[float]] = deque([start], maxlen=delay_rounds)
        self._idle = 0
        self._choose()

    def begin(self) -> "DelayedLookahead":
        """A new request starts from what validation prompts showed."""
        return DelayedLookahead(self.longest, self.measured, delay_rounds=self.delay_rounds, siblings=self.siblings)

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`; this round's confidences are noted for later rounds and change nothing now."""
        chances = self.measured.chances.of(visible.signals)[: self.longest]
        self._latest = [*chances, *self._latest[len(chances) :]]
        return super().keeps(visible)

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """One round older."""
        self._past.append(self._latest)
        self._idle = 0 if num_proposed else self._idle + 1
        self._choose()

    def _choose(self) -> None:
        length = best_length(self._past[0], self.measured.costs, self.siblings)
        if self._idle >= self._PROBE_ROUNDS:
            length = max(1, length)
        self.max_tokens = min(self.longest, length)
