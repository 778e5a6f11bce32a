"""The monitor of a published pair: what has been seen of its traffic, kept between runs, and what follows from it.

Acceptance is watched by stratum, a domain at a kind of temperature (greedy or sampled), each with a detector of its own
against the acceptance that was published there, so that a change of the mix alone moves none of them. One threshold
holds for all: a request adds to the evidence of its own stratum alone, so the sum over strata grows by 1 a request at
most while nothing has drifted, and no stratum's evidence is more than the sum.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from inference.betting import confidence_sequence
from inference.errors import InputError
from inference.records import Record
from inference.request import tree_tokens
from inference.traffic import TrafficRecord
from pipelines.drift.config import DriftConfig
from pipelines.drift.detector import EDetector
from pipelines.drift.mix import MixDetector
from pipelines.files import read_json, write_json

logger = logging.getLogger(__name__)

_SCHEMA = 1
# Rates kept for the picture and the interval; the detectors need none.
_KEPT = 2000
_LEVEL = 0.05


@dataclass(frozen=True)
class Alarm:
    """Something has changed.

    Attributes:
        kind: `target`, `tokenizer`, `chat_template` or `acceptance`.
        where: the stratum, or what changed.
        evidence: at which it was raised; infinite for what is known and not inferred.
        why: in a sentence.
    """

    kind: str
    where: str
    evidence: float
    why: str


@dataclass
class Stratum:
    """One domain at one kind of temperature."""

    reference: float
    detector: EDetector
    rates: list[float] = field(default_factory=list)
    history: list[float] = field(default_factory=list)
    alarm_at: int = 0


@dataclass
class State:
    """What the monitor remembers of one pair and target.

    Attributes:
        pair: name and version.
        target: digest of the target that serves.
        strata: by name.
        mix: of domains.
        seen: ids of the requests that counted, so that none counts twice.
        others: requests of other versions or targets, by both.
        unscored: requests of strata that the score did not have, by stratum.
    """

    pair: str
    target: str
    strata: dict[str, Stratum] = field(default_factory=dict)
    mix: MixDetector = field(default_factory=MixDetector)
    seen: set[str] = field(default_factory=set)
    others: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)


def _t_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t, by Hill's expansion of the normal one (Abramowitz and Stegun, 26.7.5).

    Too small by less than a tenth from three degrees of freedom on at the levels used here; below, the exact ones.
    """
    if freedom == 1:
        return math.tan(math.pi * (level - 0.5))
    if freedom == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    z = NormalDist().inv_cdf(level)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3 + g4 / freedom**4


def stratum_name(domain: str, temperature: float, *, tree: int = 0) -> str:
    """A stratum in words, as in `chat, greedy`; rounds of a tree accept more at every depth than chains and are told
    apart, since one pair may be served by both."""
    kind = "sampled" if temperature > 0 else "greedy"
    return f"{domain or 'unknown'}, {kind}{f' by trees of {tree}' if tree else ''}"


def references(records: Iterable[Record], arm: str) -> dict[str, float]:
    """Acceptance that was surely published, by stratum: the lower end of the mean's t interval, from a score's records.

    The score has few prompts; what its mean may have been too high by must not look like drift. The level is 5 % over
    all strata together: with that chance some reference is above the truth, and its detector alarms in the end.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        if record.arm == arm and any(record.proposed):
            rate = sum(record.accepted) / sum(record.proposed)
            tree = tree_tokens({int(length): n for length, n in record.blocks.items()}, depth=len(record.proposed))
            prompts = found.setdefault(stratum_name(record.domain, record.temperature, tree=tree), {})
            prompts.setdefault(record.prompt_id, []).append(rate)
    level = _LEVEL / max(1, len(found))
    return {
        name: _lower_end([sum(rates) / len(rates) for rates in prompts.values()], level=level)
        for name, prompts in found.items()
    }


def _lower_end(rates: list[float], *, level: float) -> float:
    """Lower end of a one-sided t interval of the mean; a single prompt says nothing, so 0."""
    if len(rates) < 2:
        return 0.0
    error = float(np.std(rates, ddof=1)) / math.sqrt(len(rates))
    return max(0.0, float(np.mean(rates)) - _t_quantile(1 - level, len(rates) - 1) * error)


def observe(state: State, records: Iterable[TrafficRecord], published: dict[str, float], cfg: DriftConfig) -> None:
    """Take in what the log has that the state has not seen.

    Args:
        state: changed in place.
        records: of the log, oldest first.
        published: reference rate by stratum; requests of a stratum that was never scored are counted, and not judged.
        cfg: bets and tolerance.
    """
    for record in records:
        if record.id in state.seen:
            continue
        state.seen.add(record.id)
        if record.pair != state.pair or record.target != state.target:
            state.others[f"{record.pair}, target {record.target[:12]}"] += record.requests
            continue
        if record.requests == 1:
            state.mix.update(record.domain or "unknown")
        rate = record.rate
        if rate is None or not 0 <= rate <= 1:
            continue
        name = stratum_name(record.domain, record.temperature, tree=record.tree)
        stratum = state.strata.get(name)
        if stratum is None:
            if name not in published:
                state.unscored[name] += 1
                continue
            reference = published[name]
            detector = EDetector(reference=reference, tolerance=cfg.tolerance, lambdas=cfg.lambdas)
            stratum = state.strata[name] = Stratum(reference, detector)
        stratum.detector.update(rate)
        stratum.rates = [*stratum.rates[-_KEPT + 1 :], rate]
        stratum.history = [*stratum.history[-_KEPT + 1 :], stratum.detector.statistic]
        if not stratum.alarm_at and stratum.detector.statistic >= cfg.threshold:
            stratum.alarm_at = stratum.detector.count


def alarms(state: State) -> list[Alarm]:
    """Strata whose acceptance has fallen, at any look so far."""
    found = []
    for name, stratum in sorted(state.strata.items()):
        if stratum.alarm_at:
            low, high = interval(stratum)
            mean = float(np.mean(stratum.rates))
            why = (
                f"acceptance on {name} has fallen: {mean:.3f} [{low:.3f}, {high:.3f}] where {stratum.reference:.3f} "
                f"was published, noticed after {stratum.alarm_at} requests"
            )
            found.append(Alarm("acceptance", name, stratum.detector.statistic, why))
    return found


def interval(stratum: Stratum) -> tuple[float, float]:
    """95 % confidence sequence of the mean rate of the requests kept."""
    return confidence_sequence(np.array(stratum.rates), low=0.0, high=1.0, alpha=0.05)


def save(state: State, path: Path) -> None:
    """Write the state whole."""
    strata = {
        name: {
            "reference": s.reference,
            "detector": s.detector.to_json(),
            "rates": s.rates,
            "history": s.history,
            "alarm_at": s.alarm_at,
        }
        for name, s in state.strata.items()
    }
    data: dict[str, Any] = {
        "schema": _SCHEMA,
        "pair": state.pair,
        "target": state.target,
        "strata": strata,
        "mix": state.mix.to_json(),
        "seen": sorted(state.seen),
        "others": dict(state.others),
        "unscored": dict(state.unscored),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, data)


def load(path: Path, *, pair: str, target: str) -> State:
    """The state of a pair and target; a new one where there is none, or that of another.

    A file that cannot be read is set aside: the log has all that is needed to make it again.
    """
    if not path.is_file():
        return State(pair, target)
    try:
        data = read_json(path)
        if data["schema"] != _SCHEMA:
            raise KeyError("schema")
        if (data["pair"], data["target"]) != (pair, target):
            logger.info("monitor: begins anew for %s and target %s", pair, target[:12])
            return State(pair, target)
        strata = {
            name: Stratum(
                float(s["reference"]),
                EDetector.from_json(s["detector"]),
                [float(rate) for rate in s["rates"]],
                [float(value) for value in s["history"]],
                alarm_at=int(s["alarm_at"]),
            )
            for name, s in data["strata"].items()
        }
        mix = MixDetector.from_json(data["mix"])
        return State(pair, target, strata, mix, set(data["seen"]), Counter(data["others"]), Counter(data["unscored"]))
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        aside = path.with_suffix(".unreadable")
        path.replace(aside)
        logger.warning("monitor: its state could not be read, set aside as %s and made again from the log", aside)
        return State(pair, target)
