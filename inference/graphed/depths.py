"""How many tokens the requests of a captured round propose, all alike: a fixed number, or the one that pays best under
the present load. Decides nothing of who is accepted.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from inference.graphed.rounds import Rounds
from inference.graphed.timing import replay_seconds

_FORGOTTEN_AFTER = 2000.0
_PRIOR_TRIALS = 32.0
_FIRST_PROBE, _LAST_PROBE = 8, 128


class Depths(Protocol):
    """How many tokens the requests of a round propose, all alike.

    The law stays the target's where a round's length depends on earlier rounds alone.

    Attributes:
        lengths: that it may choose.
    """

    lengths: Sequence[int]

    def depth(self, places: int) -> int:
        """For the coming round of so many places."""
        ...

    def observe(self, depth: int, stood: Sequence[int]) -> None:
        """A round of this depth is over; of each request so many proposed tokens stood."""
        ...


class FixedDepth:
    """Always the same.

    Args:
        length: tokens.
    """

    def __init__(self, length: int) -> None:
        self.lengths: Sequence[int] = [length]

    def depth(self, places: int) -> int:
        """See `Depths.depth`."""
        return self.lengths[0]

    def observe(self, depth: int, stood: Sequence[int]) -> None:
        """See `Depths.observe`."""


class ScheduledDepth:
    """The length with the most expected tokens a second: the load-aware schedule where all blocks are equally long.

    With l tokens a round of R requests is expected to emit R * (1 + sum_{k<=l} prod_{i<=k} a_i) tokens, in the seconds
    that it was measured to take; which l is best depends on R by these seconds alone. The acceptances a_i are those of
    earlier rounds, older ones forgotten. A position that is not proposed is not seen, so that now and then a block is
    one token longer than what seems best.

    Args:
        seconds: seconds[P][l] = of a round of P places and l tokens; see `load_seconds`.
        conditional: acceptance by position to start from; the last one stands for those behind it.
    """

    def __init__(self, seconds: Mapping[int, Mapping[int, float]], conditional: Sequence[float] = (0.5,)) -> None:
        self.seconds = seconds
        self.lengths: Sequence[int] = sorted(next(iter(seconds.values())))
        longest = self.lengths[-1]
        known = [conditional[min(k, len(conditional) - 1)] for k in range(longest)]
        self._tried = [_PRIOR_TRIALS] * longest
        self._stood = [_PRIOR_TRIALS * chance for chance in known]
        self._silent, self._probe, self._best = 0, _FIRST_PROBE, -1

    @property
    def conditional(self) -> list[float]:
        """Acceptance by position, as it is believed now."""
        return [stood / tried for stood, tried in zip(self._stood, self._tried, strict=True)]

    def depth(self, places: int) -> int:
        """See `Depths.depth`."""
        best = self._most_tokens_a_second(places)
        if best != self._best:
            self._best, self._silent, self._probe = best, 0, _FIRST_PROBE
        self._silent += 1
        longer = [length for length in self.lengths if length > best]
        if not longer or self._silent < self._probe:
            return best
        self._silent, self._probe = 0, min(2 * self._probe, _LAST_PROBE)
        return longer[0]

    def observe(self, depth: int, stood: Sequence[int]) -> None:
        """See `Depths.observe`."""
        kept = max(0.0, 1.0 - len(stood) / _FORGOTTEN_AFTER)
        for position in range(depth):
            reached = sum(count >= position for count in stood)
            passed = sum(count > position for count in stood)
            if reached:
                self._tried[position] = kept * self._tried[position] + reached
                self._stood[position] = kept * self._stood[position] + passed

    def _most_tokens_a_second(self, places: int) -> int:
        measured = min((p for p in self.seconds if p >= places), default=max(self.seconds))
        tokens, survival, expected = 1.0, 1.0, {0: 1.0}
        for position, chance in enumerate(self.conditional, start=1):
            survival *= chance
            tokens += survival
            expected[position] = tokens
        seconds = self.seconds[measured]
        return max(self.lengths, key=lambda length: expected[length] / seconds[length])


@torch.inference_mode()
def load_seconds(
    rounds: Rounds, *, places: Sequence[int], lengths: Sequence[int], context: int, sampled: bool
) -> dict[int, dict[int, float]]:
    """Seconds of captured rounds by places and tokens proposed. No request is running; afterwards no place holds one.

    Args:
        rounds: that are timed.
        places: numbers of places.
        lengths: tokens proposed.
        context: tokens that every request holds.
        sampled: which rounds.
    """
    rounds.active.zero_()  # ballast does not grow
    rounds.lengths.fill_(context)
    if rounds.context is not None:
        rounds.context.held.fill_(context)
    shown, device = rounds.shown(context), rounds.anchors.device

    def seconds(count: int, length: int) -> float:
        def once() -> None:
            rounds.round(shown=shown, sampled=sampled, places=count, block=length)

        return replay_seconds(once, device)

    found = {count: {length: seconds(count, length) for length in lengths} for count in places}
    rounds.reset()
    return found
