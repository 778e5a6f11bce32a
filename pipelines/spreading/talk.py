"""What processes tell each other while a spread target decodes: announcements and collectives, counted and timed.

Timing changes what is timed, so each of the three meters gets a run of its own, apart from those that are compared.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.processes import Group

_NAMESPACES = ("c10d", "_c10d_functional")
_NO_PAYLOAD = ("broadcast_", "wait_tensor", "barrier")
"""Announcements are broadcasts, and counted apart; the others carry nothing."""
_ON_GPU, _ON_CPU = ("nccldevkernel",), ("c10d::", "_c10d_functional::")
"""In the names of the events that are collectives: kernels on a GPU, operators on a CPU."""


@dataclass
class Announced:
    """Announcements of the first process.

    Attributes:
        count: how many.
        seconds: until the others had them.
        nbytes: of their texts.
    """

    count: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@contextmanager
def announcements(group: Group) -> Iterator[Announced]:
    """Count and time what this process announces inside the block."""
    found, announce = Announced(), group.announce

    def timed(message: dict[str, Any]) -> None:
        began = time.perf_counter()
        announce(message)
        found.seconds += time.perf_counter() - began
        found.count += 1
        found.nbytes += len(json.dumps(message, separators=(",", ":")))

    with patch.object(group, "announce", timed):
        yield found


class Collectives(TorchDispatchMode):
    """Counts collective operations of this process inside the block, and the bytes it puts into them.

    Attributes:
        count: how many.
        nbytes: of their inputs.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `TorchDispatchMode`; DTensors take themselves apart first."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in _NAMESPACES and not any(word in func.__name__ for word in _NO_PAYLOAD):
            self.count += 1
            self.nbytes += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        return func(*args, **(kwargs or {}))


def collective_seconds(work: Callable[[], object]) -> float:
    """Seconds in collectives while some work is done, waiting for the others included: of the kernels on a GPU, of the
    operators on a CPU. Announcements are left out."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        work()
    total = 0.0
    for event in profiled.key_averages():
        name = event.key.lower()
        if "broadcast" not in name and any(word in name for word in (_ON_GPU if on_gpu else _ON_CPU)):
            total += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return total / 1e6
