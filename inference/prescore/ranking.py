"""The pre-score of a draft: expected tau and speedup over fixed responses, at the block length that suits it best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from inference.costs import RoundCosts
from inference.drafters import Drafter
from inference.prescore.costs import drafting_costs
from inference.prescore.rehearsal import Expected, FixedResponse, Rehearsal, Rehearses


@dataclass(frozen=True)
class Prescore:
    """What a draft is expected to give, chains alone.

    Attributes:
        tokens: block length with the best expected speedup.
        speedup: expected over target-only decoding, all responses together, prefill apart.
        taus: by temperature, written as in "0" or "0.7", expected tokens per target pass in blocks of that length.
        draft_seconds: to propose one token.
        block_seconds: a round besides.
    """

    tokens: int
    speedup: float
    taus: dict[str, float]
    draft_seconds: float
    block_seconds: float


def prescore(
    drafter: Drafter,
    responses: Sequence[FixedResponse],
    *,
    lengths: Sequence[int],
    passes: Mapping[int, float],
    baseline_seconds: float,
    device: torch.device,
    captured: RoundCosts | None = None,
) -> Prescore | None:
    """Rehearse fixed responses and weigh what is written against the seconds it takes.

    Sums over responses come first and are divided once, as in `inference.statistics`: tau is tokens over passes, and
    the speedup is that of all tokens together. A round that proposes n tokens takes
    t_block + n t_token + t_verify(1 + n), and t_verify(1) where it proposes nothing. A captured round always proposes a
    whole block, whatever room is left, and takes what it was timed at.

    Args:
        drafter: of the draft; a request of its own under way is lost.
        responses: of any temperatures; the first few also time it.
        lengths: block lengths to choose from.
        passes: seconds of a pass of the target by width, as it verifies.
        baseline_seconds: of a pass of target-only decoding.
        device: where the drafter runs.
        captured: what captured rounds of every length take, for a draft that is decoded by them; in place of `passes`
            and of timing the drafting.

    Returns:
        None for a draft that cannot be rehearsed.
    """
    if not isinstance(drafter, Rehearses):
        return None
    rehearsals: list[Rehearsal] = []
    for response in responses:
        rehearsal = drafter.rehearse(response, longest=max(lengths))
        if rehearsal is None:
            return None
        rehearsals.append(rehearsal)
    expected = {length: [rehearsal.expected(length) for rehearsal in rehearsals] for length in lengths}
    if captured is None:
        costs = RoundCosts(passes, *drafting_costs(drafter, responses, longest=max(lengths), device=device))
        speedups = {length: expected_speedup(each, costs, baseline_seconds) for length, each in expected.items()}
    else:
        costs = captured
        whole = {n: [replace(e, rounds={n: e.passes}) for e in each] for n, each in expected.items()}
        speedups = {length: expected_speedup(each, costs, baseline_seconds) for length, each in whole.items()}
    tokens = max(lengths, key=lambda length: speedups[length])
    taus = _taus(responses, expected[tokens])
    return Prescore(tokens, speedups[tokens], taus, costs.token_seconds, costs.block_seconds)


def expected_speedup(expected: Sequence[Expected], costs: RoundCosts, baseline_seconds: float) -> float:
    """Seconds that target-only decoding takes for all responses, over those that decoding them is expected to take."""
    seconds = sum(count * costs.seconds(proposed) for each in expected for proposed, count in each.rounds.items())
    return baseline_seconds * sum(each.tokens for each in expected) / seconds


def _taus(responses: Sequence[FixedResponse], expected: Sequence[Expected]) -> dict[str, float]:
    """Expected tau by temperature."""
    sums: dict[str, tuple[int, float]] = {}
    for response, each in zip(responses, expected, strict=True):
        name = f"{response.settings.temperature:g}"
        tokens, passes = sums.get(name, (0, 0.0))
        sums[name] = (tokens + each.tokens, passes + each.passes)
    return {name: tokens / passes for name, (tokens, passes) in sums.items()}
