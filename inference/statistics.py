"""From records to the figures of method section 1, each with a bootstrap interval over prompts.

Every figure is a ratio of sums over prompts; a resample of prompts resamples numerator and denominator together, and
the arm and its baseline together, so paired comparisons stay paired. Sums first, one division at the end.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from inference.records import Record
from inference.request import PARTS

BASELINE = "none"
OVERALL = "overall"
RESAMPLES = 2000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % percentile bootstrap interval over prompts.

    The ends are None where there is no interval: a single prompt says nothing of the spread between prompts.
    """

    value: float
    low: float | None
    high: float | None

    def surely_above(self, bound: float) -> bool:
        """Whether the whole interval lies above a bound; never without an interval."""
        return self.low is not None and self.low > bound

    def surely_below(self, bound: float) -> bool:
        """Whether the whole interval lies below a bound; never without an interval."""
        return self.high is not None and self.high < bound

    def __str__(self) -> str:
        interval = "no interval" if self.low is None or self.high is None else f"{self.low:.2f}, {self.high:.2f}"
        return f"{self.value:.2f} [{interval}]"


@dataclass(frozen=True)
class Scorecard:
    """Figures of one arm on one domain at one temperature.

    Attributes:
        arm: draft name.
        domain: a domain, or `overall`.
        temperature: a temperature, or None for all of them together.
        requests: prompts times temperatures behind the figures.
        tokens: tokens emitted.
        tau: emitted tokens per target pass, bonus included.
        tau_draft: accepted draft tokens, siblings included, per target pass, bonus not included.
        alpha: accepted / proposed tokens of the chains; proposed counts tokens verified after an unbroken prefix.
        conditional: by position, accepted / verified given that all earlier positions were accepted.
        survival: by position, accepted / rounds that proposed anything (prefix survival, as vLLM reports it).
        mean_acceptance_length: 1 + accepted, siblings included, / rounds that proposed anything (as vLLM).
        mean_block: proposed tokens per round.
        tokens_per_s: emitted tokens per second, prefill included.
        speedup: tokens_per_s over that of target-only decoding on the same prompts in the same run.
        expected_speedup: tau * t_target(1) / (t_draft + t_verify + t_other) from the measured parts.
        efficiency: speedup / expected_speedup; what is missing to 1 is engine overhead and the prefill.
        speedup_over_tau: speedup / tau; above 1 beyond doubt means that the baseline is handicapped.
        seconds: by part, per target pass (prefill per request).
        draft_bytes: largest memory of the draft, weights and caches.
        target_bytes: largest memory of the target, weights and cache.
        cost_per_million: price of a million tokens at the configured price per hour; None without one.
        mismatches: greedy requests that left the target-only output.
        unexplained: those of them that are no near-tie.
    """

    arm: str
    domain: str
    temperature: float | None
    requests: int
    tokens: int
    tau: Estimate
    tau_draft: Estimate
    alpha: Estimate | None
    conditional: list[Estimate]
    survival: list[Estimate]
    mean_acceptance_length: Estimate | None
    mean_block: float
    tokens_per_s: Estimate
    speedup: Estimate
    expected_speedup: Estimate
    efficiency: Estimate
    speedup_over_tau: Estimate
    seconds: dict[str, float]
    draft_bytes: int
    target_bytes: int
    cost_per_million: float | None
    mismatches: int
    unexplained: int

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def scorecards(
    records: Iterable[Record], *, price_per_hour: float = 0.0, seed: int = 0, resamples: int = RESAMPLES
) -> list[Scorecard]:
    """Scorecards of every arm, for every domain and overall, at every temperature and over all of them.

    Args:
        records: of one run; every arm's prompts must have been decoded by the baseline too.
        price_per_hour: of the machine, in any currency; 0 for unknown.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    records = list(records)
    temperatures: list[float | None] = [*sorted({r.temperature for r in records}), None]
    domains = [*sorted({r.domain for r in records}), OVERALL]
    arms = list(dict.fromkeys(r.arm for r in records))
    arms.sort(key=lambda arm: arm != BASELINE)
    cards = []
    for temperature in temperatures:
        for domain in domains:
            chosen = [r for r in records if domain in (OVERALL, r.domain) and temperature in (None, r.temperature)]
            for arm in arms:
                if any(r.arm == arm for r in chosen):
                    cards.append(_scorecard(chosen, arm, domain, temperature, price_per_hour, seed, resamples))
    return cards


def find_card(
    cards: Iterable[Scorecard], arm: str, *, domain: str = OVERALL, temperature: float | None = None
) -> Scorecard:
    """The card of an arm.

    Raises:
        KeyError: it is not there.
    """
    for card in cards:
        if (card.arm, card.domain, card.temperature) == (arm, domain, temperature):
            return card
    raise KeyError(f"no scorecard of {arm} on {domain} at temperature {temperature}")


class Bootstrap:
    """Resampled sums over prompts; a prompt is one cluster, whatever temperatures it was decoded at."""

    def __init__(self, prompt_ids: list[str], *, seed: int, resamples: int) -> None:
        self.index = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
        count = len(self.index)
        draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
        # weights[b, i]: how often prompt i was drawn in resample b; row 0 is the sample itself.
        self.weights: Array = np.ones((resamples + 1, count))
        self.weights[1:] = np.stack([np.bincount(row, minlength=count) for row in draws])

    def sums(self, records: list[Record], value: Callable[[Record], float]) -> Array:
        """Sum of a value over records, one entry per resample, the plain sum first."""
        per_prompt = np.zeros(len(self.index))
        for record in records:
            per_prompt[self.index[record.prompt_id]] += value(record)
        total: Array = self.weights @ per_prompt
        return total

    def estimate(self, ratio: Array) -> Estimate:
        """Value of the sample (entry 0) and the interval of the resamples, those without a denominator left out."""
        defined = ratio[1:][np.isfinite(ratio[1:])]
        if len(self.index) < 2 or not defined.size:
            return Estimate(float(ratio[0]), None, None)
        low, high = np.quantile(defined, [0.025, 0.975])
        return Estimate(float(ratio[0]), float(low), float(high))


def ratio(numerator: Array, denominator: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = numerator / denominator
    return ratio


def _scorecard(
    records: list[Record],
    arm: str,
    domain: str,
    temperature: float | None,
    price_per_hour: float,
    seed: int,
    resamples: int,
) -> Scorecard:
    mine = [r for r in records if r.arm == arm]
    keys = {(r.prompt_id, r.temperature) for r in mine}
    base = [r for r in records if r.arm == BASELINE and (r.prompt_id, r.temperature) in keys]
    boot = Bootstrap([r.prompt_id for r in mine], seed=seed, resamples=resamples)
    emitted, passes = boot.sums(mine, lambda r: r.emitted), boot.sums(mine, lambda r: r.passes)
    seconds = boot.sums(mine, lambda r: r.total_seconds)
    base_emitted = boot.sums(base, lambda r: r.emitted)
    base_seconds = boot.sums(base, lambda r: r.total_seconds)
    accepted, proposed = boot.sums(mine, lambda r: sum(r.accepted)), boot.sums(mine, lambda r: sum(r.proposed))
    stood = accepted + boot.sums(mine, lambda r: sum(sum(ranks) for ranks in r.siblings))
    drafts = boot.sums(mine, lambda r: sum(n for length, n in r.blocks.items() if length != "0"))
    tau = ratio(emitted, passes)
    speed = ratio(emitted, seconds)
    speedup = ratio(speed, ratio(base_emitted, base_seconds))
    target_pass = ratio(boot.sums(base, lambda r: r.seconds["verify"]), boot.sums(base, lambda r: r.passes))
    round_seconds = ratio(seconds - boot.sums(mine, lambda r: r.seconds["prefill"]), passes)
    expected = tau * target_pass / round_seconds
    depth = max((len(r.proposed) for r in mine), default=0)
    accepted_at = [boot.sums(mine, _at("accepted", k)) for k in range(depth)]
    proposed_at = [boot.sums(mine, _at("proposed", k)) for k in range(depth)]
    value_per_s = float(speed[0])
    return Scorecard(
        arm=arm,
        domain=domain,
        temperature=temperature,
        requests=len(mine),
        tokens=int(emitted[0]),
        tau=boot.estimate(tau),
        tau_draft=boot.estimate(ratio(stood, passes)),
        alpha=boot.estimate(ratio(accepted, proposed)) if proposed[0] else None,
        conditional=[boot.estimate(ratio(a, p)) for a, p in zip(accepted_at, proposed_at, strict=True)],
        survival=[boot.estimate(ratio(a, drafts)) for a in accepted_at],
        mean_acceptance_length=boot.estimate(1.0 + ratio(stood, drafts)) if drafts[0] else None,
        mean_block=sum(int(length) * n for r in mine for length, n in r.blocks.items()) / float(passes[0]),
        tokens_per_s=boot.estimate(speed),
        speedup=boot.estimate(speedup),
        expected_speedup=boot.estimate(expected),
        efficiency=boot.estimate(ratio(speedup, expected)),
        speedup_over_tau=boot.estimate(ratio(speedup, tau)),
        seconds={
            part: sum(r.seconds[part] for r in mine) / (len(mine) if part == "prefill" else float(passes[0]))
            for part in PARTS
        },
        draft_bytes=max(r.draft_bytes for r in mine),
        target_bytes=max(r.target_bytes for r in mine),
        cost_per_million=price_per_hour / 3600.0 / value_per_s * 1e6 if price_per_hour else None,
        mismatches=sum(r.mismatch is not None for r in mine),
        unexplained=sum(r.mismatch is not None and not r.mismatch.near_tie for r in mine),
    )


def _at(field: str, position: int) -> Callable[[Record], float]:
    def value(record: Record) -> float:
        counts: list[int] = getattr(record, field)
        return float(counts[position]) if position < len(counts) else 0.0

    return value


def mean_speedup(
    records: Iterable[Record], arm: str, *, temperature: float, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Mean over domains of an arm's speedup, each domain counting alike; prompts are drawn within domains.

    Args:
        records: of one run; every arm's prompts must have been decoded by the baseline too.
        arm: which.
        temperature: of the requests that count.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    chosen = [r for r in records if r.arm in (arm, BASELINE) and r.temperature == temperature]
    speedups = []
    for number, domain in enumerate(sorted({r.domain for r in chosen})):
        own = [r for r in chosen if r.domain == domain]
        boot = Bootstrap([r.prompt_id for r in own], seed=seed + number, resamples=resamples)
        speeds = [
            ratio(boot.sums(part, lambda r: r.emitted), boot.sums(part, lambda r: r.total_seconds))
            for part in ([r for r in own if r.arm == arm], [r for r in own if r.arm == BASELINE])
        ]
        speedups.append(ratio(*speeds))
    return boot.estimate(np.mean(speedups, axis=0))


def speed_ratio(
    records: Iterable[Record],
    arm: str,
    other: str,
    *,
    temperature: float | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Tokens per second of one arm over another's, on the prompts both have decoded, paired.

    Args:
        records: of one run.
        arm: numerator.
        other: denominator.
        temperature: only records at this temperature; None for all.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ValueError: no prompt in common.
    """
    chosen = [r for r in records if temperature in (None, r.temperature)]
    sides = {name: {(r.prompt_id, r.temperature): r for r in chosen if r.arm == name} for name in (arm, other)}
    common = sorted(sides[arm].keys() & sides[other].keys())
    if not common:
        raise ValueError(f"{arm} and {other} have no prompt in common")
    boot = Bootstrap([prompt_id for prompt_id, _ in common], seed=seed, resamples=resamples)

    def speed(name: str) -> Array:
        mine = [sides[name][key] for key in common]
        return ratio(boot.sums(mine, lambda r: r.emitted), boot.sums(mine, lambda r: r.total_seconds))

    return boot.estimate(ratio(speed(arm), speed(other)))
