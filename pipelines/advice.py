"""What to do with a pair, from its scorecards: where speculation pays, what it costs, and how sure that is.

A pure function of figures that were measured already: it reads no file and decodes nothing. Each piece of advice comes
with the figures it rests on, so that a reader can disagree.

    for line in advise(cards, winner="seed"):
        sys.stdout.write(f"{line.text} ({line.evidence})\n")
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inference.batch.load import CLOSED
from inference.batch.load_figures import SCHEDULED, LoadFigure
from inference.statistics import BASELINE, OVERALL, Estimate, Scorecard, find_card

# A resample of fewer prompts repeats so few of them that percentile intervals come out too narrow.
FEW_PROMPTS = 10
_SEARCH_STEPS = 60


@dataclass(frozen=True)
class Advice:
    """One thing to do, or to know.

    Attributes:
        topic: `where`, `memory`, `cost`, `break-even`, `batches` or `evidence`.
        text: in a sentence.
        evidence: the figures behind it.
    """

    topic: str
    text: str
    evidence: str


def advise(cards: Sequence[Scorecard], *, winner: str, load: Sequence[LoadFigure] = ()) -> list[Advice]:
    """Advice on the pair that was chosen.

    Args:
        cards: of all arms, domains and temperatures of one score.
        winner: the chosen draft, `none` among them.
        load: figures of many requests at once, where they were measured.
    """
    where = [_by_temperature(cards, winner), *_by_domain(cards, winner)] if winner != BASELINE else [_not_at_all(cards)]
    break_even = [_break_even(cards, winner)] if winner != BASELINE else []
    return [
        *where,
        *break_even,
        _memory(cards, winner),
        _cost(cards, winner),
        _batches(winner, load),
        _enough(cards),
        *_noise(cards, winner),
    ]


def break_even_tau(card: Scorecard) -> float:
    """Tokens per target pass at which speculation and target-only decoding are equally fast: a round over a pass."""
    return card.tau.value / card.expected_speedup.value


def break_even_alpha(tau: float, *, block: float) -> float | None:
    """Equal acceptance at every position that gives so many tokens a pass; None where even 1 does not.

    A block of l tokens, each accepted with chance a given the earlier ones, gives 1 + a + ... + a^l. A mean block that
    is no whole number counts its last position in part.

    Args:
        tau: emitted tokens per target pass, bonus included.
        block: proposed tokens a round.
    """
    if tau <= 1.0:
        return 0.0
    if tau > 1.0 + block:
        return None
    low, high = 0.0, 1.0
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _tokens(middle, block) < tau else (low, middle)
    return high


def _tokens(alpha: float, block: float) -> float:
    whole = math.floor(block)
    return 1.0 + sum(alpha**k for k in range(1, whole + 1)) + (block - whole) * alpha ** (whole + 1)


def prompts_of(cards: Sequence[Scorecard], *, arm: str, domain: str = OVERALL) -> int:
    """Prompts behind an arm's figures: its requests at the temperature with most of them."""
    return max(c.requests for c in cards if (c.arm, c.domain) == (arm, domain) and c.temperature is not None)


def prompts_to_settle(speedup: Estimate, prompts: int) -> int | None:
    """About how many prompts would bring the interval clear of 1; None where no number can be told.

    An interval narrows with the square root of the number of prompts.
    """
    if speedup.low is None or speedup.high is None or speedup.value == 1.0:
        return None
    half = speedup.value - speedup.low if speedup.value > 1.0 else speedup.high - speedup.value
    return max(prompts + 1, math.ceil(prompts * (half / abs(speedup.value - 1.0)) ** 2))


def _temperatures(cards: Sequence[Scorecard]) -> list[float]:
    return sorted({card.temperature for card in cards if card.temperature is not None})


def _by_temperature(cards: Sequence[Scorecard], winner: str) -> Advice:
    own = [find_card(cards, winner, temperature=temperature) for temperature in _temperatures(cards)]
    return Advice("where", f"Over all domains: {_judged(own, cards)}.", _speedups(own))


def _by_domain(cards: Sequence[Scorecard], winner: str) -> list[Advice]:
    """A line for every domain, those with the greatest speedup first."""
    domains = {card.domain for card in cards if card.arm == winner} - {OVERALL}
    pooled = sorted((find_card(cards, winner, domain=d) for d in domains), key=lambda c: -c.speedup.value)
    lines = []
    for domain in (card.domain for card in pooled):
        own = [c for c in cards if (c.arm, c.domain) == (winner, domain) and c.temperature is not None]
        lines.append(Advice("where", f"On {domain}: {_judged(own, cards)}.", _speedups(own)))
    return lines


def _judged(own: Sequence[Scorecard], cards: Sequence[Scorecard]) -> str:
    """Where to speculate and where not, by temperature."""
    pays = [card for card in own if card.speedup.surely_above(1.0)]
    rest = [card for card in own if not card.speedup.surely_above(1.0)]
    parts = [f"speculate at {_at(pays)}"] if pays else []
    parts += [f"do not speculate at {_at([card])}: {_doubt(card, cards)}" for card in rest]
    return "; ".join(parts)


def _at(cards: Sequence[Scorecard]) -> str:
    return "temperature " + " and ".join(f"{card.temperature:g}" for card in cards)


def _doubt(card: Scorecard, cards: Sequence[Scorecard]) -> str:
    """Why a speedup is not above 1 beyond doubt."""
    if card.speedup.low is None:
        return "one prompt gives no interval"
    if card.speedup.surely_below(1.0):
        return "it is slower"
    prompts = prompts_of(cards, arm=card.arm, domain=card.domain)
    needed = prompts_to_settle(card.speedup, prompts)
    return "no gain is shown" + (f" (about {needed} prompts would settle it)" if needed else "")


def _speedups(own: Sequence[Scorecard]) -> str:
    return "; ".join(f"T={c.temperature:g}: {c.speedup} over {_count(c.requests, 'prompt')}" for c in own)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _not_at_all(cards: Sequence[Scorecard]) -> Advice:
    """Target-only decoding won."""
    drafts = [c for c in cards if c.arm != BASELINE and c.domain == OVERALL and c.temperature is None]
    fastest = max(drafts, key=lambda card: card.speedup.value, default=None)
    evidence = f"the fastest draft, {fastest.arm}: {fastest.speedup}" if fastest else "no draft was scored"
    return Advice("where", "Do not speculate: no draft was allowed to win against target-only decoding.", evidence)


def _break_even(cards: Sequence[Scorecard], winner: str) -> Advice:
    card = find_card(cards, winner)
    needed = break_even_tau(card)
    alpha = break_even_alpha(needed, block=card.mean_block)
    equal = "" if alpha is None else f", as with an acceptance of {alpha:.2f} at every position"
    return Advice(
        "break-even",
        f"A round costs {needed:.2f} target passes: below {needed:.2f} tokens a pass{equal}, speculation loses time.",
        f"tau {card.tau}, {card.mean_block:.1f} tokens proposed a round"
        + ("" if card.alpha is None else f", alpha {card.alpha}"),
    )


def _memory(cards: Sequence[Scorecard], winner: str) -> Advice:
    card = find_card(cards, winner)
    draft, target = card.draft_bytes / 2**20, card.target_bytes / 2**20
    share = f" ({card.draft_bytes / card.target_bytes:.0%} more than the target alone)" if draft else ""
    return Advice(
        "memory",
        f"Reserve {draft + target:.0f} MiB for weights and caches of one request{share}.",
        f"target {target:.0f} MiB, draft {draft:.0f} MiB, the largest seen",
    )


def _cost(cards: Sequence[Scorecard], winner: str) -> Advice:
    own, base = find_card(cards, winner), find_card(cards, BASELINE)
    if own.cost_per_million is None or base.cost_per_million is None:
        return Advice(
            "cost",
            "Cost per million tokens is not known: no price per hour was given.",
            "score.price_per_hour, or dspark report --price-per-hour",
        )
    saved = 1.0 - own.cost_per_million / base.cost_per_million
    text = f"A million tokens cost {own.cost_per_million:.2f}, one request at a time"
    if winner != BASELINE:
        text += f"; {'saves' if saved >= 0 else 'adds'} {abs(saved):.0%} against target-only decoding"
    return Advice("cost", f"{text}.", f"target-only {base.cost_per_million:.2f}, {own.tokens_per_s} tokens a second")


def _batches(winner: str, load: Sequence[LoadFigure]) -> Advice:
    """What is known of many requests at once."""
    closed = [f for f in load if f.arm == SCHEDULED and f.point.kind == CLOSED]
    if not closed:
        return Advice(
            "batches",
            "These figures are of one request at a time. Verifying more tokens is nearly free only while a pass is "
            "bound by reading the weights: with many requests at once gains shrink and can turn into losses.",
            f"not measured here; dspark load load.draft={winner}" if winner != BASELINE else "not measured here",
        )
    gains = [f for f in closed if f.over_none.surely_above(1.0)]
    most = max((f.point.concurrency for f in gains), default=None)
    text = (
        f"With many requests at once speculation surely gains up to {_count(most, 'request')}"
        if most
        else "With many requests at once no gain was shown"
    )
    evidence = "; ".join(f"{_count(f.point.concurrency, 'request')}: {f.over_none}" for f in closed)
    return Advice("batches", f"{text} (scheduled lengths, over target-only decoding).", evidence)


def _enough(cards: Sequence[Scorecard]) -> Advice:
    """How far the figures can be trusted."""
    prompts = prompts_of(cards, arm=BASELINE)
    domains = sorted({card.domain for card in cards} - {OVERALL})
    by_domain = {domain: prompts_of(cards, arm=BASELINE, domain=domain) for domain in domains}
    few = [domain for domain, count in by_domain.items() if count < FEW_PROMPTS]
    if prompts < 2:
        text = "One prompt decides nothing: score at least two, better ten of every domain."
    elif prompts < FEW_PROMPTS:
        text = f"{prompts} prompts show large differences only, and intervals of so few come out too narrow."
    elif few:
        text = f"{prompts} prompts are enough for the overall figure, not for {', '.join(few)} by itself."
    else:
        text = f"{prompts} prompts are enough for the overall figure and for every domain."
    return Advice("evidence", text, ", ".join(f"{domain}: {count}" for domain, count in by_domain.items()))


def _noise(cards: Sequence[Scorecard], winner: str) -> list[Advice]:
    """A speedup above tau cannot be the draft's doing: the machine was busy while the baseline ran."""
    odd = [c for c in cards if c.arm == winner != BASELINE and c.speedup.value > c.tau.value]
    if not odd:
        return []
    places = ", ".join(f"{c.domain} at {'all temperatures' if c.temperature is None else _at([c])}" for c in odd)
    evidence = f"{odd[0].domain}: speedup {odd[0].speedup}, tau {odd[0].tau}"
    text = f"The machine was disturbed while this was measured: faster than tau allows on {places}."
    return [Advice("evidence", f"{text} Score again on an idle one.", evidence)]
