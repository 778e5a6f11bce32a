"""Arms on the same units of work, in turns and in shuffled order, and ratios whose intervals keep the pairs together.

A unit is a prompt, a set of prompts, or a round. What makes a unit slow, its length or a busy machine, then falls on
all arms alike. Times whatever it is given; what an arm does is the row's business.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from inference.statistics import Array, Bootstrap, Estimate, ratio
from pipelines.progress import tracked

RESAMPLES = 2000
Unit = TypeVar("Unit")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """One arm on one unit.

    Attributes:
        unit: its name.
        arm: name of the arm.
        order: place among the arms of this unit, from 0.
        amount: of work done, in tokens or whatever the row counts.
        seconds: it took.
    """

    unit: str
    arm: str
    order: int
    amount: float
    seconds: float


def device_clock(device: torch.device) -> Clock:
    """Seconds, read when the device has done what it was given."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def interleaved(
    units: Mapping[str, Unit],
    arms: Mapping[str, Callable[[Unit], float]],
    *,
    title: str,
    unit: str,
    seed: int,
    clock: Clock = time.perf_counter,
    warm_up: Sequence[Unit] | None = None,
) -> list[Sample]:
    """Run every arm on every unit: all arms on one unit before the next, in an order shuffled anew for each.

    Args:
        units: by name.
        arms: by name; each does a unit and returns how much it did.
        title: for the progress.
        unit: what units are, in the plural, for the progress.
        seed: of the orders.
        clock: seconds.
        warm_up: units that every arm does first, not counted; None for the first unit.
    """
    for first in list(units.values())[:1] if warm_up is None else warm_up:
        for run in arms.values():
            run(first)
    draw = random.Random(seed)
    samples = []
    for name, work in tracked(list(units.items()), title, unit=unit):
        order = list(arms)
        draw.shuffle(order)
        for place, arm in enumerate(order):
            gc.collect()  # what one arm left behind is not collected in another's time
            began = clock()
            amount = arms[arm](work)
            samples.append(Sample(name, arm, place, float(amount), clock() - began))
    return samples


def speed_ratio(samples: Sequence[Sample], arm: str, other: str, *, seed: int = 0) -> Estimate:
    """Amount per second of one arm over another's: a ratio of sums over units, resampled with both arms together.

    Raises:
        ValueError: an arm lacks a unit that the other has done.
    """
    units = _units(samples, arm)
    if not units or set(units) != set(_units(samples, other)):
        raise ValueError(f"{arm} and {other} were not run on the same units")
    boot = Bootstrap(units, seed=seed, resamples=RESAMPLES)
    return boot.estimate(ratio(_speed(boot, samples, arm), _speed(boot, samples, other)))


def speed(samples: Sequence[Sample], arm: str, *, seed: int = 0) -> Estimate:
    """Amount per second of one arm."""
    boot = Bootstrap(_units(samples, arm), seed=seed, resamples=RESAMPLES)
    return boot.estimate(_speed(boot, samples, arm))


def median_seconds(samples: Sequence[Sample], arm: str, *, seed: int = 0) -> Estimate:
    """Median seconds of an arm over its units, units resampled."""
    seconds = np.array([sample.seconds for sample in samples if sample.arm == arm])
    draws = np.random.default_rng(seed).integers(len(seconds), size=(RESAMPLES, len(seconds)))
    medians = np.concatenate([[np.median(seconds)], np.median(seconds[draws], axis=1)])
    return Bootstrap(_units(samples, arm), seed=seed, resamples=1).estimate(medians)


def exponent(sizes: Sequence[float], seconds: Array, *, seed: int = 0) -> Estimate:
    """Exponent b of seconds ~ size^b: the least-squares slope of logarithms, averaged over rounds, rounds resampled.

    Args:
        sizes: `[n]`, ascending.
        seconds: `[rounds, n]`.
        seed: of the bootstrap.
    """
    boot = _rounds(seconds, seed)
    logs = boot.weights @ np.log(seconds) / len(seconds)
    return boot.estimate(_slopes(np.log(np.asarray(sizes)), logs))


def exponent_beyond_first(sizes: Sequence[float], seconds: Array, *, seed: int = 0) -> Estimate:
    """The same of what a size costs more than the first one, by how much larger it is: without what any size costs.

    Sizes that cost no more than the first, as noise has it, are left out of the fit.
    """
    boot = _rounds(seconds, seed)
    means = boot.weights @ seconds / len(seconds)
    more = np.log(np.asarray(sizes)[1:] - sizes[0])
    found = []
    for row in means[:, 1:] - means[:, :1]:
        kept = row > 0
        found.append(float(_slopes(more[kept], np.log(row[kept])[None])[0]) if kept.sum() > 1 else math.nan)
    return Estimate(math.nan, None, None) if math.isnan(found[0]) else boot.estimate(np.array(found))


def _rounds(seconds: Array, seed: int) -> Bootstrap:
    return Bootstrap([str(number) for number in range(len(seconds))], seed=seed, resamples=RESAMPLES)


def _slopes(x: Array, y: Array) -> Array:
    """Least-squares slopes of rows `[m, n]` against `x` `[n]`."""
    centred = x - x.mean()
    slopes: Array = y @ centred / (centred @ centred)
    return slopes


def _units(samples: Sequence[Sample], arm: str) -> list[str]:
    return list(dict.fromkeys(sample.unit for sample in samples if sample.arm == arm))


def _speed(boot: Bootstrap, samples: Sequence[Sample], arm: str) -> Array:
    """Amount over seconds of an arm in every resample, the sample itself first."""
    amounts, seconds = np.zeros(len(boot.index)), np.zeros(len(boot.index))
    for sample in samples:
        if sample.arm == arm:
            amounts[boot.index[sample.unit]] += sample.amount
            seconds[boot.index[sample.unit]] += sample.seconds
    return ratio(boot.weights @ amounts, boot.weights @ seconds)
