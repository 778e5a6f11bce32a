"""A process whose forward and backward passes are CUDA graphs, one for each shape of a batch.

Small drafts are trained in steps of many small kernels, which a host launches more slowly than a GPU runs them; a graph
is one launch. Its price: batches of few shapes, and a loss that nothing waits for. A shape's first batch runs kernel by
kernel, which is what warms it up, its second one is captured; all of them count. Gradients lie in the same memory from
the first step on and are added to there. Without a GPU the same work runs uncaptured.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from train.batches import Batch
from train.engines.plain import PlainEngine
from train.results import LossOutput, Number

_Shape = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class _Program:
    """A captured micro-batch.

    Attributes:
        inputs: what it reads; a batch is copied there.
        run: adds its gradients and gives its sums.
    """

    inputs: Batch
    run: Callable[[], LossOutput]


class CapturedEngine(PlainEngine):
    """See the module; arguments are those of `PlainEngine`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._programs: dict[_Shape, _Program | None] = {}
        self._pool: Any = None
        # Warm-ups and captures share a stream: what accumulates gradients remembers on which it was made.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def accumulate(self, batches: Iterable[Batch]) -> list[LossOutput]:
        """See `Engine.accumulate`."""
        grads = [p.grad for _, p in self._named if p.grad is not None]
        if grads:
            torch._foreach_zero_(grads)
        return [self._micro(batch) for batch in batches]

    def _micro(self, batch: Batch) -> LossOutput:
        shape = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(batch.items()))
        if shape not in self._programs:
            self._programs[shape] = None
            return self._warmed_up(batch)
        program = self._programs[shape]
        if program is None:
            program = self._programs[shape] = self._captured(batch)
        for name, tensor in batch.items():
            program.inputs[name].copy_(tensor, non_blocking=True)
        return program.run()

    def _warmed_up(self, batch: Batch) -> LossOutput:
        """A shape's first micro-batch, kernel by kernel."""
        if self._stream is None:
            return self._backward(batch)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            output = self._backward(batch)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return output

    def _captured(self, batch: Batch) -> _Program:
        inputs = {name: tensor.to(self._device, copy=True) for name, tensor in batch.items()}
        if self._stream is None:
            return _Program(inputs, partial(self._backward, inputs))
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # a graph or an event that is freed while another graph is captured spoils that one
        try:
            # Other threads may use the device meanwhile, as the one does by which NCCL watches its work.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                output = self._backward(inputs)
        finally:
            if collecting:
                gc.enable()
        self._pool = self._pool or graph.pool()

        def replay() -> LossOutput:
            graph.replay()
            return _copied(output)

        return _Program(inputs, replay)


def _copied(output: LossOutput) -> LossOutput:
    """What a replay left, safe from the next one."""
    return LossOutput(
        output.loss_sum.clone(),
        _kept(output.weight_sum),
        {name: (_kept(value), _kept(total)) for name, (value, total) in output.sums.items()},
        tokens=_kept(output.tokens),
        supervised=_kept(output.supervised),
        fed=_kept(output.fed),
    )


def _kept(number: Number) -> Number:
    return number.clone() if isinstance(number, Tensor) else number
