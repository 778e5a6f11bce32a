"""How well a device is used while training: tokens a second, memory, and model FLOPs against its fastest product.

Estimates for people: nothing here decides anything. FLOPs are counted by torch in one forward pass of the real loss,
and the backward pass is taken for twice that; the peak is measured on this device with one large matrix product.
"""

import functools
import logging
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

_LOG = logging.getLogger(__name__)
_TRAINING_OVER_FORWARD = 3.0
_SIZE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 4


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


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on a GPU what torch allocated there, else what was resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
