"""How soon detectors notice a fall of acceptance, and how often they cry wolf, on the same streams:

    python -m pipelines.drift.simulate --runs 200 --out docs

A request has a latent acceptance, Beta with mean 0.70 and standard deviation 0.12, and 20 to 119 graded tokens; its
rate is what is fed. Ours is `pipelines.drift.detector.EDetector`; ADWIN and Page-Hinkley are river's (the extra
`drift`), at their defaults. river 0.26 has no CUSUM, so that is the textbook's, one-sided, with mean and deviation
known (allowance 0.5, limit 5 deviations), written out here.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from inference.errors import InputError
from pipelines.drift.config import DriftConfig
from pipelines.drift.detector import EDetector
from pipelines.files import replacing, write_json, write_text
from pipelines.report import markdown_table

Array = NDArray[np.float64]
Alarm = Callable[[Array], int | None]
"""Rates of a stream -> number of requests after which the first alarm came, or None."""

MEAN, SPREAD, TOKENS = 0.70, 0.12, (20, 120)
DROPS = (0.02, 0.05, 0.10)
STATIONARY, BEFORE, AFTER = 20_000, 500, 8_000
_KNOWN_SD = 0.135


@dataclass(frozen=True)
class Row:
    """One detector.

    Attributes:
        detector: its name.
        runs: streams of each kind.
        false_alarms: share of stationary streams with an alarm.
        stationary: requests in each of them.
        found: share of shifted streams with an alarm after the shift and none before, by drop.
        delay: median requests from the shift to it.
        early: share of shifted streams with an alarm before the shift, by drop.
    """

    detector: str
    runs: int
    false_alarms: float
    stationary: int
    found: list[float]
    delay: list[float]
    early: list[float]


def rates(rng: np.random.Generator, count: int, *, mean: float = MEAN) -> Array:
    """Acceptance rates of requests."""
    total = mean * (1 - mean) / SPREAD**2 - 1
    latent = rng.beta(mean * total, (1 - mean) * total, size=count)
    tokens = rng.integers(*TOKENS, size=count)
    found: Array = rng.binomial(tokens, latent) / tokens
    return found


def ours(tolerance: float) -> Alarm:
    """The e-detector at a tolerance, alarm at its default threshold."""
    cfg = DriftConfig(tolerance=tolerance)

    def alarm(stream: Array) -> int | None:
        detector = EDetector(reference=MEAN, tolerance=tolerance, lambdas=cfg.lambdas)
        for number, rate in enumerate(stream.tolist(), start=1):
            detector.update(rate)
            if detector.statistic >= cfg.threshold:
                return number
        return None

    return alarm


def of_tokens(tolerance: float) -> Alarm:
    """A mutant: the same detector fed single tokens, each as if it were a request."""
    fed = ours(tolerance)

    def alarm(stream: Array) -> int | None:
        rng = np.random.default_rng(int(stream[:8].sum() * 1e9))
        tokens = (rng.random((len(stream), TOKENS[0])) < stream[:, None]).astype(np.float64)
        found = fed(tokens.reshape(-1))
        return None if found is None else math.ceil(found / TOKENS[0])

    return alarm


def cusum(allowance: float = 0.5, limit: float = 5.0) -> Alarm:
    """One-sided CUSUM on standardised rates."""

    def alarm(stream: Array) -> int | None:
        sum_below = 0.0
        for number, rate in enumerate(stream.tolist(), start=1):
            sum_below = max(0.0, sum_below + (MEAN - rate) / _KNOWN_SD - allowance)
            if sum_below > limit:
                return number
        return None

    return alarm


def river(name: str) -> Alarm:
    """A detector of river's at its defaults.

    Raises:
        InputError: river is not installed.
    """
    try:
        from river import drift
    except ImportError:
        raise InputError("river is not installed", where="simulate", mend="pip install 'dspark[drift]'") from None

    def alarm(stream: Array) -> int | None:
        detector: Any = getattr(drift, name)()
        for number, rate in enumerate(stream.tolist(), start=1):
            detector.update(rate)
            if detector.drift_detected:
                return number
        return None

    return alarm


def measure(name: str, alarm: Alarm, *, runs: int, seed: int) -> Row:
    """False alarms and delays of one detector; equal seeds give equal streams."""
    rng = np.random.default_rng(seed)
    flat = [alarm(rates(rng, STATIONARY)) for _ in range(runs)]
    found, delay, early = [], [], []
    for drop in DROPS:
        rng = np.random.default_rng([seed, int(drop * 1000)])
        ends = []
        for _ in range(runs):
            ends.append(alarm(np.concatenate([rates(rng, BEFORE), rates(rng, AFTER, mean=MEAN - drop)])))
        late = [end - BEFORE for end in ends if end is not None and end > BEFORE]
        found.append(len(late) / runs)
        delay.append(float(np.median(late)) if late else math.nan)
        early.append(sum(end is not None and end <= BEFORE for end in ends) / runs)
    return Row(name, runs, sum(end is not None for end in flat) / runs, STATIONARY, found, delay, early)


def table(rows: list[Row]) -> str:
    """The rows for people."""
    header = ["detector", "runs", f"false alarms in {STATIONARY:,}", *(f"-{d:.2f}: found, delay" for d in DROPS)]
    body = []
    for row in rows:
        cells = [
            f"{found:.0%}, {delay:.0f}" + (f" ({early:.0%} before)" if early else "") if found else "never"
            for found, delay, early in zip(row.found, row.delay, row.early, strict=True)
        ]
        body.append([row.detector, str(row.runs), f"{row.false_alarms:.1%}", *cells])
    return markdown_table(header, body)


def plot(rows: list[Row], path: Path) -> None:
    """Delay against drop, one line a detector; false alarms in the legend."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(DROPS, row.delay, "o-", label=f"{row.detector} ({row.false_alarms:.0%} false alarms)")
    axes.set(yscale="log", xlabel="fall of mean acceptance", ylabel="median delay, requests", xticks=DROPS)
    axes.legend(fontsize=8)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=100)


def main(argv: list[str]) -> int:
    """Run the simulation; the table goes to stdout and into a folder.

    Raises:
        InputError: river is not installed.
    """
    parser = argparse.ArgumentParser(prog="python -m pipelines.drift.simulate", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="streams of each kind (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for drift_detectors.json, .md and .png")
    words = parser.parse_args(argv)
    detectors = {
        "e-detector, tolerance 0.01": ours(0.01),
        "e-detector, tolerance 0.005": ours(0.005),
        "e-detector fed tokens": of_tokens(0.01),
        "ADWIN (river)": river("ADWIN"),
        "Page-Hinkley (river)": river("PageHinkley"),
        "CUSUM (k 0.5, h 5)": cusum(),
    }
    rows = [measure(name, alarm, runs=words.runs, seed=words.seed) for name, alarm in detectors.items()]
    text = table(rows)
    sys.stdout.write(text)
    if words.out:
        write_json(words.out / "drift_detectors.json", [asdict(row) for row in rows])
        write_text(words.out / "drift_detectors.md", text)
        plot(rows, words.out / "drift_detectors.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
