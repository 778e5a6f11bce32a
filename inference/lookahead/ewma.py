"""The length with the most expected tokens a second, from a running estimate of each position's acceptance.

The estimate starts from what validation prompts showed, follows the request by an exponentially weighted mean, and is
forgotten with it. Only earlier rounds enter, so the rule is lossless at any temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from inference.lookahead import BlockConfig, Measured, SteadyLookahead
from inference.lookahead._worth import best_length


@dataclass(kw_only=True)
class Config(BlockConfig):
    """A running estimate; see also `BlockConfig`.

    Attributes:
        kind: this policy.
        tokens: longest block.
        rate: weight of a new observation, in (0, 1].
        probe_rounds: after so many rounds of one length the next longer one is tried once, so that positions that are
            not proposed are not forgotten; 0 never tries.
    """

    weighs_costs = True

    kind: str = "ewma"
    tokens: int = 8
    rate: float = 0.1
    probe_rounds: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"lookahead.rate is {self.rate}; use a weight above 0 and up to 1")
        if self.probe_rounds < 0:
            raise ValueError(f"lookahead.probe_rounds is {self.probe_rounds}; use 0 for never or a number of rounds")

    def build(self, tokens: int, siblings: Sequence[int] = (), measured: Measured | None = None) -> "EwmaLookahead":
        """See `BlockConfig.build`."""
        known = self.need(measured)
        return EwmaLookahead(tokens, known, rate=self.rate, probe_rounds=self.probe_rounds, siblings=siblings)


class EwmaLookahead(SteadyLookahead):
    """Keeps positions up to the length that is best by the estimate so far.

    Attributes:
        conditional: the estimate: acceptance of each position given that all before it stood.
    """

    def __init__(
        self, tokens: int, measured: Measured, *, rate: float, probe_rounds: int, siblings: Sequence[int] = ()
    ) -> None:
        super().__init__(tokens, siblings=siblings)
        self.measured, self.rate, self.probe_rounds = measured, rate, probe_rounds
        known = measured.conditional or (0.5,)
        self.conditional = [known[min(k, len(known) - 1)] for k in range(tokens)]
        self._rounds = 0
        self._choose()

    def begin(self) -> "EwmaLookahead":
        """A new request starts from what validation prompts showed."""
        return EwmaLookahead(
            self.longest, self.measured, rate=self.rate, probe_rounds=self.probe_rounds, siblings=self.siblings
        )

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Positions up to the first rejection were seen; the others say nothing."""
        for position in range(min(num_proposed, num_accepted + 1)):
            self.conditional[position] += self.rate * ((position < num_accepted) - self.conditional[position])
        self._rounds += 1
        self._choose()

    def _choose(self) -> None:
        length = best_length(self.conditional, self.measured.costs, self.siblings)
        if self.probe_rounds and self._rounds and self._rounds % self.probe_rounds == 0:
            length += 1
        self.max_tokens = min(length, self.longest)
