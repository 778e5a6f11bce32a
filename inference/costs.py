"""What a round costs, from measured pieces: the target's pass by its width, and drafting. Measures nothing itself."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inference.errors import InputError


def interpolated(known: Mapping[int, float], width: float) -> float:
    """Value at any width, linear between the known ones and beyond the widest; the narrowest's own below it."""
    points = sorted(known.items())
    if width <= points[0][0] or len(points) == 1:
        return points[0][1]
    upper = next((i for i, (w, _) in enumerate(points) if w >= width), len(points) - 1)
    (w0, t0), (w1, t1) = points[upper - 1], points[upper]
    return t0 + (t1 - t0) * (width - w0) / (w1 - w0)


def monotone(values: list[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (one, m), (other, n) = pools[-2:]
            pools[-2:] = [((one * m + other * n) / (m + n), m + n)]
    return [mean for mean, count in pools for _ in range(count)]


@dataclass(frozen=True)
class RoundCosts:
    """Seconds of one round of one request.

    Attributes:
        passes: passes[width] = seconds of a target pass of `width` tokens.
        block_seconds: of drafting a block, whatever its length; a round that proposes nothing spends none.
        token_seconds: of drafting one token, besides.
    """

    passes: Mapping[int, float]
    block_seconds: float = 0.0
    token_seconds: float = 0.0

    def seconds(self, tokens: int, siblings: Sequence[int] = ()) -> float:
        """Seconds of a round that proposes so many tokens, with so many siblings beside each position."""
        drafting = self.block_seconds + tokens * self.token_seconds if tokens else 0.0
        return drafting + interpolated(self.passes, 1 + tokens + sum(siblings[:tokens]))

    def with_passes(self, passes: Mapping[int, float]) -> "RoundCosts":
        """The same draft where passes take other times: drafting is scaled by what a pass of one token takes."""
        scale = interpolated(passes, 1) / interpolated(self.passes, 1)
        return RoundCosts(passes, scale * self.block_seconds, scale * self.token_seconds)

    def to_json(self) -> dict[str, Any]:
        """For `pair.json`; widths become strings there."""
        return {
            "passes": {str(width): seconds for width, seconds in self.passes.items()},
            "block_seconds": self.block_seconds,
            "token_seconds": self.token_seconds,
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str) -> "RoundCosts":
        """Read what `to_json` wrote.

        Raises:
            InputError: no passes, or something that is not a time.
        """
        try:
            passes = {int(width): float(seconds) for width, seconds in data["passes"].items()}
            costs = cls(passes, float(data["block_seconds"]), float(data["token_seconds"]))
            times = (*passes.values(), costs.block_seconds, costs.token_seconds)
            if not passes or min(passes) < 1 or not all(math.isfinite(t) and t >= 0.0 for t in times):
                raise ValueError("a time is missing, negative or not a number")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the costs are off: {error}", where=where, mend="publish the pair again") from None
        return costs
