"""The gate: champion and challenger on the same held-out prompts, judged after every prompt, with errors that hold
however often it looks.

What is tested is the mean over prompts of the paired log ratio of speeds, cut to plus or minus `clip`. With arms in
random order an equal challenger gives it a symmetric law, so its mean is 0 however noisy the machine. Every test bets
against its null (`inference.betting`), and the chance that its wealth ever reaches 1 / alpha is at most alpha while the
null holds:

- promote when "not faster" is refuted and, for every domain, "slower by the margin or more" is refuted. The first alone
  bounds false promotions by alpha; the others can only take promotions away.
- keep when a domain is surely slower than its margin, when the gain is surely below what is useful, or when no prompt
  is left.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from inference.betting import BettingTest
from inference.records import Record
from pipelines.realign.config import GateConfig

OTHER = "other"
PROMOTE, KEEP, GIVE_UP = "promote", "keep", "give_up"


@dataclass(frozen=True)
class Pairing:
    """One held-out prompt under both drafts, all temperatures together.

    Attributes:
        prompt_id: of the prompt.
        domain: of the prompt.
        log_speed: log of the challenger's tokens per second over the champion's.
    """

    prompt_id: str
    domain: str
    log_speed: float


@dataclass(frozen=True)
class Verdict:
    """What the gate has decided: `promote`, `keep` (surely not worth it) or `give_up` (undecided), and why."""

    outcome: str
    reason: str


@dataclass(frozen=True)
class Look:
    """The gate after a prompt: log wealth against "not faster", and by domain against "slower by the margin"."""

    prompt_id: str
    faster: float
    domains: dict[str, float]
    useless: float


def pairings(records: Iterable[Record], *, challenger: str, champion: str) -> list[Pairing]:
    """Paired log ratios by prompt, in the order the prompts were decoded; means over temperatures."""
    found: dict[str, dict[float, dict[str, Record]]] = {}
    for record in records:
        found.setdefault(record.prompt_id, {}).setdefault(record.temperature, {})[record.arm] = record
    result = []
    for prompt_id, temperatures in found.items():
        both = [
            (arms[challenger], arms[champion]) for arms in temperatures.values() if {challenger, champion} <= {*arms}
        ]
        if not both:
            continue
        speed = [math.log(_speed(new) / _speed(old)) for new, old in both]
        result.append(Pairing(prompt_id, both[0][0].domain, sum(speed) / len(speed)))
    return result


def _speed(record: Record) -> float:
    return record.emitted / record.total_seconds


class Gate:
    """The sequential decision.

    Args:
        cfg: levels and margins.
        prompts: held-out prompts there are, by domain; they decide which domains are judged by themselves.

    Attributes:
        looks: the evidence after every prompt.
    """

    def __init__(self, cfg: GateConfig, prompts: dict[str, int]) -> None:
        self.cfg = cfg
        self._group = {name: name if count >= cfg.min_domain_prompts else OTHER for name, count in prompts.items()}
        self._left = Counter(prompts)
        log_useful, log_margin = math.log1p(cfg.useful), math.log1p(-cfg.margin)
        bounds = {"low": -cfg.clip, "high": cfg.clip}
        self._faster = BettingTest(null_mean=0.0, alternative="greater", **bounds)
        self._useless = BettingTest(null_mean=log_useful, alternative="less", **bounds)
        groups = sorted(set(self._group.values()))
        self._sound = {g: BettingTest(null_mean=log_margin, alternative="greater", **bounds) for g in groups}
        self._harmed = {g: BettingTest(null_mean=log_margin, alternative="less", **bounds) for g in groups}
        self.looks: list[Look] = []

    def update(self, pairing: Pairing) -> Verdict | None:
        """Take one more prompt in; returns the decision once there is one.

        Raises:
            ValueError: a ratio that is no number.
        """
        if not math.isfinite(pairing.log_speed):
            raise ValueError(f"the speeds on prompt {pairing.prompt_id} have no ratio")
        value = min(max(pairing.log_speed, -self.cfg.clip), self.cfg.clip)
        group = self._group[pairing.domain]
        for test in (self._faster, self._useless, self._sound[group], self._harmed[group]):
            test.update(value)
        self._left[pairing.domain] -= 1
        sound = {name: test.log_wealth for name, test in self._sound.items()}
        self.looks.append(Look(pairing.prompt_id, self._faster.log_wealth, sound, self._useless.log_wealth))
        return self._decide()

    def _decide(self) -> Verdict | None:
        cfg = self.cfg
        harmed = [name for name, test in self._harmed.items() if test.rejected(cfg.alpha)]
        if harmed:
            return Verdict(KEEP, f"surely slower by more than {cfg.margin:.0%} on {', '.join(harmed)}")
        unproved = [name for name, test in self._sound.items() if not test.rejected(cfg.alpha)]
        if self._faster.rejected(cfg.alpha) and not unproved:
            return Verdict(PROMOTE, f"faster (p <= {self._faster.p_value:.2g}), no domain slower by {cfg.margin:.0%}")
        if self._useless.rejected(cfg.alpha):
            return Verdict(KEEP, f"surely gains less than {cfg.useful:.0%}")
        if sum(self._left.values()) > 0:
            return None
        if not self._faster.rejected(cfg.alpha):
            return Verdict(
                GIVE_UP, f"not shown to be faster in {len(self.looks)} prompts (p {self._faster.p_value:.2g})"
            )
        return Verdict(GIVE_UP, f"faster, but not shown to be no slower on {', '.join(unproved)}")


def decide(cfg: GateConfig, pairs: list[Pairing], prompts: dict[str, int]) -> tuple[Gate, Verdict | None]:
    """Run a gate over pairings up to its decision."""
    gate = Gate(cfg, prompts)
    for pairing in pairs:
        verdict = gate.update(pairing)
        if verdict is not None:
            return gate, verdict
    return gate, None
