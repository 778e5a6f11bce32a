"""How well a device is used while training: steps and tokens a second, memory, and operations against what it can do.

Figures for people: nothing here decides anything. Operations are counted while one real step runs, forward and
backward, of products and attention alone; the peak is the device's own (`train.peaks`) or the configuration's.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from train.memory import device_peak, resident_peak

_LOG = logging.getLogger(__name__)


class FlopCount(TorchDispatchMode):
    """Counts floating-point operations of what runs inside, the backward pass included.

    Kernels of libraries that torch does not know, such as those of 4-bit weights, count nothing.

    Attributes:
        flops: operations so far, of products and attention.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add what it took."""
        output = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            try:
                self.flops += formula(*args, **(kwargs or {}), out_val=output)
            except Exception as error:  # a form of the operation that torch's formula does not know
                _LOG.info("operations of %s are not counted: %s", func, error)
        return output


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Of the CPU's kernel, which torch does not count."""
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return flops


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flops: int = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    return flops


_FORMULAS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class Speed:
    """What a training comes to a second, at the median time of its steps.

    Attributes:
        steps_per_s: optimizer steps.
        tokens_per_s: positions learned from, over all processes.
        fed_tokens_per_s: tokens that the model read, without padding; None where the loss does not tell.
        step_tflops: operations of one step over all processes, in 10^12, counted in an early one; None where nothing
            was counted.
        peak_tflops: what the devices of all processes can do together, in 10^12 a second; None where it is not known.
    """

    steps_per_s: float
    tokens_per_s: float
    fed_tokens_per_s: float | None = None
    step_tflops: float | None = None
    peak_tflops: float | None = None

    @property
    def mfu(self) -> float | None:
        """Share of the peak that is reached; None where the peak or the operations are not known."""
        if self.step_tflops is None or self.peak_tflops is None:
            return None
        return self.step_tflops * self.steps_per_s / self.peak_tflops

    def figures(self) -> dict[str, float]:
        """All that is known, by name."""
        names = ("steps_per_s", "tokens_per_s", "fed_tokens_per_s", "step_tflops", "peak_tflops", "mfu")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        """One line for people."""
        said = f"{self.steps_per_s:.3g} steps/s, {self.tokens_per_s:,.0f} supervised tokens/s"
        if self.fed_tokens_per_s is not None:
            said += f", {self.fed_tokens_per_s:,.0f} fed tokens/s"
        if self.step_tflops is not None:
            said += f", {self.step_tflops * self.steps_per_s:.3g} TFLOP/s"
        if self.mfu is not None:
            said += f" ({100 * self.mfu:.3g} % of {self.peak_tflops:g})"
        return said


class Usage:
    """Sums of steps since the last line, and what they come to.

    Args:
        device: of the training.
        peak: operations a second of all processes' devices together; None where that is not known.
    """

    def __init__(self, device: torch.device, peak: float | None) -> None:
        self._device, self._peak = device, peak
        self._steps, self._tokens, self._fed, self._seconds = 0, 0, 0, 0.0

    def step(self, *, tokens: int, fed: int, seconds: float) -> None:
        """Note a step: its tokens over all processes, and its seconds without logging, evaluation and checkpoints."""
        self._steps += 1
        self._tokens += tokens
        self._fed += fed
        self._seconds += seconds

    def taken(self, flops: float) -> dict[str, float]:
        """`steps_per_s`, `tokens_per_s`, `memory_gib` and, where known, `fed_tokens_per_s` and `mfu` of the steps since
        last asked.

        Args:
            flops: of one step over all processes.
        """
        seconds = max(self._seconds, 1e-9)
        usage = {
            "steps_per_s": self._steps / seconds,
            "tokens_per_s": self._tokens / seconds,
            "memory_gib": (device_peak() if self._device.type == "cuda" else resident_peak()) / 2**30,
        }
        if self._fed:
            usage["fed_tokens_per_s"] = self._fed / seconds
        if self._peak and flops:
            usage["mfu"] = flops * self._steps / seconds / self._peak
        self._steps, self._tokens, self._fed, self._seconds = 0, 0, 0, 0.0
        return usage


__all__ = ["FlopCount", "Speed", "Usage"]
