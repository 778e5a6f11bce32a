"""Many processes, each with the whole of what is trained: gradients are summed, and every process makes the same step.

For what is too small to be worth spreading. A step's micro-batches are dealt out, each process makes the passes of its
own, kernel by kernel or as replayed CUDA graphs; then one all-reduce of one flat tensor sums the gradients. Weights,
gradients and optimizer state are the same everywhere and never sent again. Processes are those of torch.distributed;
without any, this one is alone.
"""

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from train.batches import Batch
from train.engines.captured import CapturedEngine
from train.engines.plain import PlainEngine
from train.engines.spreading import check_spread, join
from train.engines.together import Together
from train.errors import TrainingError
from train.optimizers import OptimizerConfig
from train.results import LossOutput

_MARKS = 2**20  # so that a sum of their squares over thousands of processes is exact in fp64


class ReplicatedEngine(Together, PlainEngine):
    """See `Engine`; passes are made kernel by kernel.

    Args:
        module: what is trained; on every process the same.
        optimizer: builds the optimizer.
        accumulation: micro-batches of a step, over all processes.
        given: further arguments of `PlainEngine`.

    Raises:
        TrainingError: micro-batches cannot be dealt out evenly, or other parameters are trained on another process.
    """

    def __init__(self, module: nn.Module, *, optimizer: OptimizerConfig, accumulation: int, **given: Any) -> None:
        join(module)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        check_spread(optimizer, accumulation=accumulation, size=self.size, stage=0)
        super().__init__(module, optimizer=optimizer, **given)
        self._mark = _mark(self._named)
        self.total(torch.zeros(0, dtype=torch.float64))
        self._start_alike()

    def accumulate(self, batches: Iterable[Batch]) -> list[LossOutput]:
        """See `Engine.accumulate`."""
        outputs = super().accumulate(batches)
        self._mark = _mark([(name, p) for name, p in self._named if p.grad is not None])
        return outputs

    def total(self, values: Tensor) -> Tensor:
        """See `Engine.total`. Along with every sum goes a mark of which parameters have gradients: processes that added
        up different ones would add what does not belong together, or wait for ever.

        Raises:
            TrainingError: the marks differ; on all processes.
        """
        marks = torch.tensor([self._mark, self._mark**2], dtype=torch.float64)
        *sums, mark, square = super().total(torch.cat([values, marks])).tolist()
        # Of equal numbers alone is the mean of squares the square of the mean.
        if int(square) * self.size != int(mark) ** 2:
            raise TrainingError(
                "the processes have gradients of different parameters",
                where="trainer=replicated",
                mend="use trainer=deepspeed, or a draft of which every batch reaches the same parameters",
            )
        return torch.tensor(sums, dtype=torch.float64)

    def move(self, weight: float) -> float:
        """See `Engine.move`; where the norm is not finite, no process moved."""
        if self.size > 1:
            self._sum_gradients()
        return super().move(weight)

    def _sum_gradients(self) -> None:
        """Put the sums over all processes in the gradients' places, by one exchange for each of their formats."""
        grads = [p.grad for _, p in self._named if p.grad is not None]
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            same = [grad for grad in grads if grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in same])
            distributed.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in same])
            torch._foreach_copy_(same, [part.view_as(grad) for part, grad in zip(parts, same, strict=True)])


class ReplicatedCapturedEngine(ReplicatedEngine, CapturedEngine):
    """The same with passes captured as CUDA graphs, those of `CapturedEngine`; what is summed lies outside of them."""


def _mark(named: Iterable[tuple[str, nn.Parameter]]) -> int:
    """A number of some parameters' names and shapes."""
    return zlib.crc32(repr([(name, tuple(p.shape)) for name, p in named]).encode()) % _MARKS


__all__ = ["ReplicatedCapturedEngine", "ReplicatedEngine"]
