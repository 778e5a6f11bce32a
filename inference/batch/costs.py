"""What a round of several requests costs on this machine: passes over many blocks, and drafting, by requests.

`measure_load_costs` times both once; `LoadCosts` looks them up. Contexts hold noise: only their shape counts.
"""

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inference.batch.drafting import DraftGroup
from inference.batch.ragged import ragged_logits
from inference.costs import interpolated, monotone
from inference.drafters import Ask
from inference.errors import InputError
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.sampling_settings import SamplingSettings

_CONTEXT_TOKENS = 128
_BLOCK_WIDTHS = (1, 2, 3, 5, 9)
_REPEATS = 5
_CELL_SECONDS = 1.0


@dataclass(frozen=True)
class LoadCosts:
    """Seconds by number of requests.

    Attributes:
        passes: passes[R][b] = seconds of a target pass that verifies b tokens of R requests in all, anchors included;
            the lower quartile of repeats, never less for more tokens.
        drafts: drafts[R] = seconds of drafting for R requests: whatever the length, and for each further token.
        spread: spread[R][b] = distance of a pass's lower quartile from its median, seconds.
    """

    passes: Mapping[int, Mapping[int, float]]
    drafts: Mapping[int, tuple[float, float]]
    spread: Mapping[int, Mapping[int, float]]

    def pass_seconds(self, requests: int, tokens: float) -> float:
        """Seconds of a pass over so many tokens of so many requests; linear between what was measured."""
        return _between(
            self.passes, requests, lambda row, measured: interpolated(row, max(1.0, tokens / requests) * measured)
        )

    def draft_seconds(self, requests: int, tokens: int) -> float:
        """Seconds of drafting so many tokens for each of so many requests; none for no tokens."""
        if not tokens:
            return 0.0
        return _between(self.drafts, requests, lambda pair, measured: pair[0] + tokens * pair[1])

    def table(self) -> list[list[str]]:
        """For people: a header, then by number of requests milliseconds of passes by tokens a request (lower quartile
        and its distance from the median), of drafting one token, and of each further one."""
        count, first = next(iter(self.passes.items()))
        rows = [["requests", *(str(tokens // count) for tokens in first), "drafting 1", "one more"]]
        for requests, row in self.passes.items():
            cells = [f"{1e3 * s:.1f} +{1e3 * self.spread[requests][b]:.1f}" for b, s in row.items()]
            block, token = self.drafts[requests]
            rows.append([str(requests), *cells, f"{1e3 * (block + token):.1f}", f"{1e3 * token:.1f}"])
        return rows

    def to_json(self) -> dict[str, Any]:
        """For files; numbers of requests and tokens become strings there."""
        return {
            "passes": _named(self.passes),
            "drafts": {str(requests): list(pair) for requests, pair in self.drafts.items()},
            "spread": _named(self.spread),
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str) -> "LoadCosts":
        """Read what `to_json` wrote.

        Raises:
            InputError: a part is missing or no time.
        """
        try:
            passes, spread = (
                {int(r): {int(b): float(s) for b, s in row.items()} for r, row in data[name].items()}
                for name in ("passes", "spread")
            )
            drafts = {int(r): (float(block), float(token)) for r, (block, token) in data["drafts"].items()}
            if not passes or passes.keys() != drafts.keys():
                raise ValueError("passes and drafts are not of the same numbers of requests")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the costs under load are off: {error}", where=where, mend="measure them again") from None
        return cls(passes, drafts, spread)


def _named(table: Mapping[int, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {str(outer): {str(inner): value for inner, value in row.items()} for outer, row in table.items()}


def _between(table: Mapping[int, Any], requests: int, value: Callable[[Any, int], float]) -> float:
    """`value` of an entry and its number of requests, linear in that number, and beyond both ends as the nearest two
    would have it."""
    known = sorted(table)
    if len(known) == 1 or requests in table:
        nearest = requests if requests in table else known[0]
        return value(table[nearest], nearest)
    upper = min(max(1, bisect_left(known, requests)), len(known) - 1)
    low, high = known[upper - 1], known[upper]
    at_low, at_high = value(table[low], low), value(table[high], high)
    return max(0.0, at_low + (at_high - at_low) * (requests - low) / (high - low))


@torch.inference_mode()
def measure_load_costs(
    target: CausalModel, group: Callable[[int], DraftGroup], *, requests: Sequence[int], longest: int
) -> LoadCosts:
    """Time passes and drafting for these numbers of requests.

    Args:
        target: whose passes are timed.
        group: a new group of drafts for so many requests.
        requests: numbers of requests, ascending.
        longest: longest block that will be drafted.
    """
    widths = [width for width in _BLOCK_WIDTHS if width == 1 or width <= 1 + 2 * longest]
    passes, spread, drafts = {}, {}, {}
    for count in requests:
        fits = _time_passes(target, count, widths)
        fitted = monotone([lower for lower, _ in fits])
        passes[count] = {count * width: seconds for width, seconds in zip(widths, fitted, strict=True)}
        spread[count] = {count * width: gap for width, (_, gap) in zip(widths, fits, strict=True)}
        drafts[count] = _time_drafts(target, group(count), count, longest)
    return LoadCosts(passes, drafts, spread)


def _time_passes(target: CausalModel, count: int, widths: Sequence[int]) -> list[tuple[float, float]]:
    """Lower quartile and its distance to the median, by tokens a request; widths take turns."""
    cache = target.new_slots(max_slots=count, max_tokens=target.context_limit)
    context = min(_CONTEXT_TOKENS, target.context_limit // 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.vocab_size, (count * max(context, *widths),), generator=generator).to(target.device)
    nothing = torch.empty(0, dtype=torch.long, device=target.device)
    for slot in range(count):
        cache.join()
        ragged_logits(target, tokens[:context], [context], cache, rows=nothing, active=[slot])
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    rounds, spent = 0, 0.0
    # The first round warms up.
    while rounds < 3 or (rounds <= _REPEATS and spent < _CELL_SECONDS * len(widths)):
        for width in widths:
            cache.rollback([context] * count)
            start = time.perf_counter()
            ragged_logits(target, tokens[: count * width], [width] * count, cache)
            _wait(target.device)
            if rounds:
                seconds[width].append(time.perf_counter() - start)
            spent += time.perf_counter() - start
        rounds += 1
    quartiles = [statistics.quantiles(seconds[width], n=4) for width in widths]
    return [(lower, median - lower) for lower, median, _ in quartiles]


def _time_drafts(target: CausalModel, group: DraftGroup, count: int, longest: int) -> tuple[float, float]:
    """Seconds of drafting whatever the length, and for each token, from blocks of one and of `longest` tokens, or of as
    many as the draft proposes at most."""
    context = min(_CONTEXT_TOKENS, target.context_limit // 2)
    lengths = [tokens for _ in range(1 + _REPEATS) for tokens in sorted({1, longest})]
    generator = torch.Generator().manual_seed(1)
    shape = (count, context + len(lengths))
    texts = torch.randint(target.vocab_size, shape, generator=generator).to(target.device)
    width = target.model.config.get_text_config(decoder=True).hidden_size * len(group.taps)
    features = torch.randn(context, width, generator=generator).to(target.device, target.model.dtype)
    for slot in range(count):
        group.join(texts[slot, :context])
        if group.taps:
            group.read(slot, features[: context - 1])
    source, settings = TorchSource.seeded(0, device=target.device), SamplingSettings()
    seconds: dict[int, list[float]] = {1: [], longest: []}
    drafted = 1
    # Between two blocks every context grows by a token, as in decoding.
    for end, tokens in enumerate(lengths, start=context):
        asks = [Ask(text[:end], tokens, FixedLookahead(tokens), settings, source) for text in texts]
        start = time.perf_counter()
        proposals = group.propose(asks)
        _wait(target.device)
        drafted = max(drafted, *(len(proposal) for proposal in proposals))
        seconds[tokens].append(time.perf_counter() - start)
        group.rollback([0] * count)
        for slot in range(count if group.taps else 0):
            group.read(slot, features[:1])
    # The first of each warms up.
    seconds = {tokens: taken[1:] for tokens, taken in seconds.items()}
    one, all_of_them = (statistics.quantiles(seconds[tokens], n=4)[0] for tokens in (1, longest))
    token = max(0.0, (all_of_them - one) / (drafted - 1)) if drafted > 1 else one
    return max(0.0, one - token), token


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
