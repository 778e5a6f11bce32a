"""The prefix scheduler with chances learnt while decoding: the draft's margins against what became of its tokens.

Nothing is trained beforehand and no confidence head is needed (`inference.margin`). The curves are shared by all
requests and follow the traffic; a position that no curve is trusted for is proposed, so that labels come in uncensored.
A curve is fitted to earlier rounds alone, so the rule is lossless at any temperature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inference.lookahead import BlockConfig, Measured, Visible
from inference.lookahead.scheduled import ScheduledLookahead
from inference.margin import LEAST, REFIT_EVERY, WINDOW, MarginEstimator


@dataclass(kw_only=True)
class Config(BlockConfig):
    """Margins in place of confidences; see also `BlockConfig` and `inference.margin.MarginEstimator`.

    Attributes:
        kind: this policy.
        tokens: longest block.
        window: latest verdicts that count, per position.
        refit_every: verdicts between two refits.
        least: verdicts before a position's curve is trusted.
        patience_rounds: see `scheduled`.
    """

    weighs_costs = True
    learns = True

    kind: str = "estimator"
    tokens: int = 8
    window: int = WINDOW
    refit_every: int = REFIT_EVERY
    least: int = LEAST
    patience_rounds: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience_rounds < 0:
            raise ValueError(f"lookahead.patience_rounds is {self.patience_rounds}; use 0 for never or a number")
        self._estimator()

    def build(
        self, tokens: int, siblings: Sequence[int] = (), measured: Measured | None = None
    ) -> "EstimatorLookahead":
        """See `BlockConfig.build`."""
        return EstimatorLookahead(
            tokens,
            self.need(measured),
            estimator=self._estimator(),
            patience_rounds=self.patience_rounds,
            siblings=siblings,
        )

    def _estimator(self) -> MarginEstimator:
        return MarginEstimator(window=self.window, refit_every=self.refit_every, least=self.least)


class EstimatorLookahead(ScheduledLookahead):
    """Admits positions while they pay by the margins' curves.

    A drafter without rows has no margins; its own confidence stands in.
    """

    learns = True

    def __init__(
        self,
        tokens: int,
        measured: Measured,
        *,
        estimator: MarginEstimator,
        patience_rounds: int,
        siblings: Sequence[int] = (),
    ) -> None:
        super().__init__(tokens, measured, patience_rounds=patience_rounds, siblings=siblings)
        self.reads = frozenset({"confidence", "margin"})
        self.estimator = estimator
        self._margins: list[float] = []

    def begin(self) -> "EstimatorLookahead":
        """Requests share the curves and nothing else."""
        return EstimatorLookahead(
            self.longest,
            self.measured,
            estimator=self.estimator,
            patience_rounds=self.pause.patience_rounds,
            siblings=self.siblings,
        )

    def chances(self, visible: Visible) -> list[float]:
        """c_1..c_k by the curves; 1 where none is trusted yet."""
        found = []
        for position, known in enumerate(visible.signals, start=1):
            chance: float | None = known.confidence
            if not math.isnan(known.margin):
                chance = self.estimator.chance(position, known.margin)
            found.append(1.0 if chance is None else chance)
        return found

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`. The margins are noted, to be learnt from when the verdict comes."""
        self._margins = [known.margin for known in visible.signals]
        position = visible.position
        if position <= self.max_tokens and self._untried(position):
            return True
        return super().keeps(visible)

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Positions up to the first rejection have verdicts."""
        for position, margin in enumerate(self._margins[: min(num_proposed, num_accepted + 1)], start=1):
            if not math.isnan(margin):
                self.estimator.add(position, margin, position <= num_accepted)
        self._margins = []
        super().observe(num_proposed, num_accepted)

    def _untried(self, position: int) -> bool:
        """Whether the position's own curve is not trusted yet: it is then proposed whatever it costs."""
        margin = self._margins[position - 1]
        return not math.isnan(margin) and self.estimator.chance(position, margin) is None
