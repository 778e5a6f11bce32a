"""Where the time of a few steps goes: torch's profiler around them, and a short table beside the checkpoints.

dspark build trainer.profile_steps=5     # leaves profile.json in the draft's folder
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PROFILE_FILE = "profile.json"
_WARM_STEPS = 3
_ROWS = 15
_COLLECTIVES = ("nccl", "gloo", "all_reduce", "allreduce", "all_gather", "reduce_scatter", "c10d::")


class StepProfile:
    """Profiles steps of a run; does nothing where none are asked for.

    Args:
        steps: how many, after three that warm up.
        file: gets the table; None for a process that only takes part.
    """

    def __init__(self, steps: int, file: Path | None) -> None:
        self._steps, self._file = steps, file
        self._seen = 0
        self._profile: Any = None

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._end()

    def step(self) -> None:
        """A step is about to begin."""
        if self._steps and self._seen == _WARM_STEPS:
            # A GPU's kernels alone: the operators that launch them are many, and nobody looks at them.
            activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
            self._profile = profile(activities=[activity])
            self._profile.__enter__()
        elif self._profile is not None and self._seen == _WARM_STEPS + self._steps:
            self._end()
        self._seen += 1

    def _end(self) -> None:
        self._profile.__exit__(None, None, None)
        if self._file is not None:
            self._file.write_text(json.dumps(_table(self._profile), indent=1) + "\n", encoding="utf-8")
        self._profile = None


def _table(profiled: Any) -> dict[str, Any]:
    """Milliseconds on the device (on a CPU: of the operators themselves), in all, in collectives, and by kernel."""
    on_gpu = torch.cuda.is_available()
    rows: list[tuple[str, float, int]] = []
    for event in profiled.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0 and not (on_gpu and event.device_type == torch.profiler.DeviceType.CPU):
            rows.append((event.key, own / 1000.0, event.count))
    rows.sort(key=lambda row: -row[1])
    collective = sum(ms for name, ms, _ in rows if any(word in name.lower() for word in _COLLECTIVES))
    return {
        "total_ms": round(sum(ms for _, ms, _ in rows), 3),
        "collectives_ms": round(collective, 3),
        "rows": [{"name": name[:120], "ms": round(ms, 3), "calls": calls} for name, ms, calls in rows[:_ROWS]],
    }
