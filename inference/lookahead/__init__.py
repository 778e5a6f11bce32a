"""How many tokens to propose: one module per policy, asked position by position, left to right.

A policy is lossless only if it decides on position k from what was known before token k was sampled. That is a type
here: a policy sees `Visible` and nothing else, and a drafter asks it before it samples. What it was told of earlier
rounds (`observe`) is past, and may be used in any way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from inference.calibration import Calibration
from inference.costs import RoundCosts
from inference.errors import InputError


@dataclass(frozen=True)
class Signals:
    """What is known of a position before its token is drawn; each not a number where it was not asked for.

    Attributes:
        confidence: chance that the token will survive given the ones before it: the draft's own head where it has one,
            else the largest probability of the row.
        entropy: of the row the token will be drawn from, nats; not a number for drafters without rows.
        margin: between the two largest logits of that row, at most 30; likewise.
    """

    confidence: float = math.nan
    entropy: float = math.nan
    margin: float = math.nan


@dataclass(frozen=True)
class Visible:
    """All that a policy may look at when it decides whether position `position` is proposed.

    Attributes:
        position: 1-based position in the block.
        signals: of positions 1..position, each known before its own token was sampled; empty when the policy reads
            none.
    """

    position: int
    signals: tuple[Signals, ...] = ()


@dataclass(frozen=True)
class Chances:
    """The chance that a position survives given the earlier ones, from what is known before its token is drawn.

    Attributes:
        source: `confidence`, the draft's own, calibrated; or `margin`, by a logistic curve per position.
        calibration: of the confidences; None takes them as they are.
        curves: (b, w) by position: sigmoid(b + w * margin); positions beyond the last use the last.
    """

    source: str = "confidence"
    calibration: Calibration | None = None
    curves: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.source not in ("confidence", "margin") or (self.source == "margin" and not self.curves):
            raise ValueError(
                f"chances come from {self.source!r} with {len(self.curves)} curves; choose confidence, or "
                "margin with a curve at least"
            )

    @property
    def reads(self) -> frozenset[str]:
        """Fields of `Signals` that are needed: a drafter without rows has no margins, only confidences."""
        return frozenset({"confidence", "margin"} if self.source == "margin" else {"confidence"})

    def of(self, signals: Sequence[Signals]) -> list[float]:
        """c_1..c_k, by position."""
        return [self._chance(position, known) for position, known in enumerate(signals, start=1)]

    def _chance(self, position: int, known: Signals) -> float:
        if self.source == "margin" and not math.isnan(known.margin):
            intercept, slope = self.curves[min(position, len(self.curves)) - 1]
            return 0.5 * (1.0 + math.tanh(0.5 * (intercept + slope * known.margin)))
        return self.calibration.apply(position, known.confidence) if self.calibration else known.confidence

    def to_json(self) -> dict[str, Any]:
        """For `pair.json`."""
        return {
            "source": self.source,
            "calibration": self.calibration and self.calibration.to_json(),
            "curves": [list(curve) for curve in self.curves],
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str) -> "Chances":
        """Read what `to_json` wrote.

        Raises:
            InputError: a part is missing or is not what it should be.
        """
        try:
            curves = tuple((float(intercept), float(slope)) for intercept, slope in data["curves"])
            if not all(math.isfinite(number) for curve in curves for number in curve):
                raise ValueError("a curve is not finite")
            known = data["calibration"]
            calibration = None if known is None else Calibration.from_json(known, where=where)
            return cls(str(data["source"]), calibration, curves)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the chances are off: {error}", where=where, mend="publish the pair again") from None


@dataclass(frozen=True)
class Measured:
    """What was measured of a draft before, on validation prompts; for policies that weigh tokens against seconds.

    Attributes:
        costs: of a round, on this device.
        conditional: acceptance of each position given that all before it stood.
        chances: how signals become chances of survival.
    """

    costs: RoundCosts
    conditional: tuple[float, ...]
    chances: Chances = Chances()

    def to_json(self) -> dict[str, Any]:
        """For `pair.json`."""
        return {
            "costs": self.costs.to_json(),
            "conditional": list(self.conditional),
            "chances": self.chances.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str) -> "Measured":
        """Read what `to_json` wrote.

        Raises:
            InputError: a part is missing, or no time or chance.
        """
        try:
            conditional = tuple(float(chance) for chance in data["conditional"])
            if not all(0.0 <= chance <= 1.0 for chance in conditional):
                raise ValueError("a chance lies outside [0, 1]")
            costs, chances = data["costs"], data["chances"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the measurements are off: {error}", where=where, mend="publish the pair again") from None
        return cls(RoundCosts.from_json(costs, where=where), conditional, Chances.from_json(chances, where=where))


@dataclass(kw_only=True)
class BlockConfig:
    """What every policy is told about the block, besides its own settings.

    Attributes:
        kind: name of the policy.
        tokens: longest block; 0 lets the score choose a length per draft, and the siblings with it, from acceptance and
            pass times it measures on validation prompts, and fixes both before the held-out prompts are touched.
        longest_auto: longest block that the automatic choice may take.
        siblings: tokens offered beside the one at each position, where `tokens` is set.
        siblings_auto: most of them beside one position that the automatic choice may take; 0 for chains alone.
        trees: sizes, in drafted tokens a round, of the trees that the score tries for greedy captured rounds; the one
            that pays most on validation prompts is taken in place of the chain, if any does, and by sampled ones too
            if it pays there. Empty for chains alone.
        tree_depths: most drafted tokens of a path of a tree; every size is tried with each.
        tree_lookup: tokens of one more branch of every tree, copied from where the text's end stood before; 0 for none.
        weighs_costs: whether the policy needs measured seconds.
        calibrates: whether the policy goes by chances, which are worth calibrating first.
        learns: whether requests change what later requests are proposed.
    """

    weighs_costs: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    kind: str
    tokens: int = 0
    longest_auto: int = 8
    siblings: list[int] = field(default_factory=list)
    siblings_auto: int = 3
    trees: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    tree_depths: list[int] = field(default_factory=lambda: [5, 6, 8])
    tree_lookup: int = 16

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"lookahead.tokens is {self.tokens}; use 0 for the automatic choice or a positive length")
        if self.longest_auto < 1:
            raise ValueError(f"lookahead.longest_auto is {self.longest_auto}; use at least 1")
        if self.siblings_auto < 0 or any(count < 0 for count in self.siblings):
            raise ValueError("lookahead.siblings and lookahead.siblings_auto count tokens; use 0 or more")
        if self.siblings and not self.tokens:
            raise ValueError("lookahead.siblings needs a block length of your own; set lookahead.tokens as well")
        if any(size < 1 for size in self.trees):
            raise ValueError(f"lookahead.trees is {self.trees}; give sizes of at least 1, or [] for chains alone")
        if not self.tree_depths or any(depth < 1 for depth in self.tree_depths):
            raise ValueError(f"lookahead.tree_depths is {self.tree_depths}; give depths of at least 1")
        if self.tree_lookup < 0:
            raise ValueError(f"lookahead.tree_lookup is {self.tree_lookup}; use 0 for none or a number of tokens")

    def build(self, tokens: int, siblings: Sequence[int] = (), measured: Measured | None = None) -> "Lookahead":
        """The policy, with the longest block and the siblings that were chosen for one draft.

        Args:
            tokens: longest block.
            siblings: beside the token at each position, from the first.
            measured: of the draft; what a policy does not use may be left out.

        Raises:
            ValueError: the policy needs measurements and was given none.
        """
        raise NotImplementedError

    def need(self, measured: Measured | None) -> Measured:
        """The measurements, for policies that cannot do without."""
        if measured is None:
            raise ValueError(f"lookahead={self.kind} weighs tokens against seconds and was given no measured costs")
        return measured


class Lookahead(Protocol):
    """A policy.

    Attributes:
        longest: no block is ever longer than this.
        max_tokens: no block of the coming round is longer than this.
        siblings: how many tokens are offered beside the one at each position, from the first; fixed before the request,
            and 0 for positions beyond the last entry.
        reads: fields of `Signals` that drafters must supply.
        learns: whether requests change what later requests are proposed.
    """

    @property
    def longest(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def siblings(self) -> tuple[int, ...]: ...

    @property
    def reads(self) -> frozenset[str]: ...

    @property
    def learns(self) -> bool: ...

    def begin(self) -> "Lookahead":
        """The policy for one request: nothing that happens in it shows in another, unless the policy `learns`."""
        ...

    def keeps(self, visible: Visible) -> bool:
        """Whether the position is proposed; the first refusal ends the block."""
        ...

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Told after every round what became of the block."""
        ...


class SteadyLookahead:
    """What policies have in common that keep nothing from one round to the next."""

    reads: frozenset[str] = frozenset()
    learns = False

    def __init__(self, tokens: int, *, siblings: Sequence[int] = ()) -> None:
        self.longest = self.max_tokens = tokens
        self.siblings = tuple(siblings)

    def begin(self) -> "Lookahead":
        """See `Lookahead.begin`."""
        return self

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        return visible.position <= self.max_tokens

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Nothing is learnt."""


class RecordingLookahead(SteadyLookahead):
    """Proposes whole blocks and keeps what was known of them before the verdict; for calibration.

    Attributes:
        rounds: signals of what was proposed, and how many of the tokens stood; rounds without a proposal left out.
    """

    reads = frozenset({"confidence", "margin"})

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.rounds: list[tuple[tuple[Signals, ...], int]] = []
        self._signals: tuple[Signals, ...] = ()

    def keeps(self, visible: Visible) -> bool:
        """See `Lookahead.keeps`."""
        self._signals = visible.signals
        return super().keeps(visible)

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """One round more."""
        if num_proposed:
            self.rounds.append((self._signals[:num_proposed], num_accepted))
