"""Seconds inside a model's passes, by hooks on it: whoever makes them, the engine or transformers."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from inference.model import CausalModel

Clock = Callable[[], float]


@dataclass
class PassTimer:
    """Seconds inside a model's passes, and their number."""

    seconds: float = 0.0
    passes: int = 0


@contextmanager
def timed_passes(model: CausalModel, *, clock: Clock = time.perf_counter) -> Iterator[PassTimer]:
    """Time every pass of a model inside the block, whoever makes it; waits for an accelerator at both ends."""
    timer, began = PassTimer(), [0.0]
    now = clocked(model.device, clock)

    def before(*_: object) -> None:
        began[0] = now()

    def after(*_: object) -> None:
        timer.seconds += now() - began[0]
        timer.passes += 1

    handles = [model.model.register_forward_pre_hook(before), model.model.register_forward_hook(after)]
    try:
        yield timer
    finally:
        for handle in handles:
            handle.remove()


def clocked(device: torch.device, clock: Clock) -> Clock:
    """The clock, read when the device has done what it was given."""
    if device.type != "cuda":
        return clock

    def now() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return now
