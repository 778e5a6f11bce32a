"""What DeepSpeed is given to drive: one module whose only pass is the loss. Knows nothing of how it is spread."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from train.batches import Batch
from train.engines import Loss


class Whole(nn.Module):
    """What is trained, as one module whose only pass is the loss; everything it runs is inside that pass.

    Args:
        module: what is trained.
        loss: batch to sums.
        used_apart: parts of the module whose parameters are read outside their own `forward`.
    """

    def __init__(self, module: nn.Module, loss: Loss, used_apart: Iterable[nn.Module]) -> None:
        super().__init__()
        self.module = module
        self._loss, self._used_apart = loss, list(used_apart)

    def gather_directly(self, register: Callable[[nn.Module, nn.Parameter], None]) -> None:
        """Let this module's pass gather what no pass of its own does: parameters of parts used apart, and of whatever
        has parts itself. Parts used apart are called with other tensors in their parameters' places, so they are rid of
        DeepSpeed's hooks."""
        found = [p for part in self._used_apart for p in part.parameters()]
        found += [p for part in self.module.modules() if any(True for _ in part.children()) for p in _own(part)]
        for parameter in {id(p): p for p in found}.values():
            register(self, parameter)
        for inner in (inner for part in self._used_apart for inner in part.modules()):
            inner._forward_pre_hooks.clear()
            inner._forward_hooks.clear()

    def forward(self, batch: Batch | None, call: Callable[[], Any] | None = None) -> Any:
        """The loss of a batch, its other sums left in `output`; or the value of `call`, for what is not a loss."""
        if batch is None:
            assert call is not None, "without a batch there is something to call"
            return call()
        self.output = self._loss(batch)
        return self.output.loss_sum


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


__all__ = ["Whole"]
