"""Seconds and most memory that a piece of work takes in this process. It changes nothing but the mark it reads.

    with watched() as watch:
        work()
    watch.took().resident_bytes

Linux keeps the highest resident size of a process and forgets it on demand; elsewhere the figure is of the whole
process so far, and says so. Other processes, such as those of torchrun, are not looked at.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_HIGHEST = "VmHWM:"


@dataclass(frozen=True)
class Took:
    """What a piece of work took.

    Attributes:
        seconds: wall clock.
        resident_bytes: most memory that was resident meanwhile, whatever it was held for.
        device_bytes: most that torch had allocated on one GPU meanwhile; 0 where it used none.
        since_start: the memory is the most since the process began, because the system cannot forget what was before.
    """

    seconds: float
    resident_bytes: int
    device_bytes: int
    since_start: bool


class Watch:
    """Looks on from where it is made; others may be made and read meanwhile."""

    def __init__(self) -> None:
        self._resident = self._device = 0
        self._since_start = not _mark()
        self._start = time.monotonic()

    def note(self, resident: int, device: int) -> None:
        """Take in what was held until now."""
        self._resident, self._device = max(self._resident, resident), max(self._device, device)

    def took(self) -> Took:
        """What was taken until now."""
        self.note(resident_peak(), device_peak())
        return Took(time.monotonic() - self._start, self._resident, self._device, self._since_start)


_watching: list[Watch] = []
"""Those that are to learn of a mark before it is forgotten for another one."""


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch the block; one inside another is part of what the outer one took."""
    watch = Watch()
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)


def resident_peak() -> int:
    """Most bytes resident since the process began or, where the system can forget, since the last watch began."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(_HIGHEST))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def device_peak() -> int:
    """Most bytes that torch had allocated on one GPU since the last watch began; 0 where it has used none."""
    import torch

    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return max((int(torch.cuda.max_memory_allocated(device)) for device in used), default=0)


def _mark() -> bool:
    """Forget the peaks, after all who watch have noted them; whether the system can."""
    resident, device = resident_peak(), device_peak()
    for watch in _watching:
        watch.note(resident, device)
    import torch

    for gpu in range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ():
        torch.cuda.reset_peak_memory_stats(gpu)
    try:
        _FORGET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
