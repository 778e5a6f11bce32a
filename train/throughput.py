"""How well a device is used while training: tokens a second, memory, and model FLOPs against its fastest product.

Estimates for people: nothing here decides anything. FLOPs are counted by torch in one forward pass of the real loss,
and the backward pass is taken for twice that; the peak is measured on this device with one large matrix product.
"""

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from train.memory import device_peak, resident_peak

_LOG = logging.getLogger(__name__)
_TRAINING_OVER_FORWARD = 3.0
_SIZE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 4


class Usage:
    """Sums of steps since the last line, and what they come to.

    Args:
        device: of the training.
        precision: of its products, "fp32" or "bf16".
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self._device, self._precision = device, precision
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
        self.flops: float | None = None
        """Of one step on this process; None before they were counted."""

    def step(self, *, tokens: int, seconds: float) -> None:
        """Note a step: its tokens over all processes, and its seconds without logging, evaluation and checkpoints."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds

    def taken(self) -> dict[str, float]:
        """`tokens_per_s`, `mfu` and `memory_gib` of the steps since last asked."""
        assert self.flops is not None, "FLOPs are counted before they are divided"
        seconds = max(self._seconds, 1e-9)
        rate = self.flops * self._steps / seconds
        usage = {
            "tokens_per_s": self._tokens / seconds,
            "mfu": rate / peak_flops(self._device, self._precision),
            "memory_gib": (device_peak() if self._device.type == "cuda" else resident_peak()) / 2**30,
        }
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
        return usage


def training_flops(forward: Callable[[], object]) -> float:
    """FLOPs of a training step of what `forward` computes; 0 where torch cannot count them."""
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            forward()
    except Exception as error:  # a kernel of a library that does not go through the dispatcher
        _LOG.info("FLOPs are not counted: %s", error)
        return 0.0
    return _TRAINING_OVER_FORWARD * float(counter.get_total_flops())


@functools.lru_cache
def peak_flops(device: torch.device, precision: str) -> float:
    """FLOPs a second of one large matrix product, the best of a few."""
    size = _SIZE.get(device.type, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
