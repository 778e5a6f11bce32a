"""Tokens a second: what one more token is worth, and which length is best, from chances and measured seconds.

Expected tokens of a round that proposes l are 1 + sum_{k<=l} a_k, where a_k is the chance that the first k all stand
(method section 3; the target adds one). Chances count for the chain alone; siblings count only by what they cost.
"""

from collections.abc import Sequence

from inference.costs import RoundCosts


def best_length(conditional: Sequence[float], costs: RoundCosts, siblings: Sequence[int]) -> int:
    """The length, from 0, with the most expected tokens a second; the shorter of equals.

    Looks at all lengths at once, so `conditional` must be known before anything of the block is sampled.
    """
    best, best_rate, survival, tokens = 0, 1.0 / costs.seconds(0), 1.0, 1.0
    for length, chance in enumerate(conditional, start=1):
        survival *= chance
        tokens += survival
        rate = tokens / costs.seconds(length, siblings)
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def pays(survivals: Sequence[float], costs: RoundCosts, siblings: Sequence[int]) -> bool:
    """Whether the last of these positions raises expected tokens a second over the block without it.

    Args:
        survivals: a_1..a_k, chances that the first 1..k tokens all stand.
        costs: of a round.
        siblings: beside each position.
    """
    length, tokens = len(survivals), 1.0 + sum(survivals)
    with_it = tokens / costs.seconds(length, siblings)
    return with_it > (tokens - survivals[-1]) / costs.seconds(length - 1, siblings)
