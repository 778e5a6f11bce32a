"""One process, torch's own backward pass and optimizer."""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn, optim

from train import checkpoint, precision
from train.batches import Batch
from train.engines import Loss
from train.optimizers import OptimizerConfig
from train.results import LossOutput

Value = TypeVar("Value")


class PlainEngine:
    """See `Engine`.

    Args:
        module: what is trained.
        loss: runs under the given arithmetic.
        optimizer: builds the optimizer.
        arithmetic: "fp32" or "bf16".
        clip_norm: largest gradient norm (0 = no clipping).
    """

    rank, size = 0, 1

    def __init__(
        self, module: nn.Module, *, loss: Loss, optimizer: OptimizerConfig, arithmetic: str, clip_norm: float
    ) -> None:
        self._module, self._loss, self._arithmetic, self._clip_norm = module, loss, arithmetic, clip_norm
        self._named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._device = self._named[0][1].device
        self.optimizer: optim.Optimizer = optimizer.build(self._named)

    def accumulate(self, batches: Iterable[Batch]) -> list[LossOutput]:
        """See `Engine.accumulate`; one batch is held at a time."""
        self.optimizer.zero_grad(set_to_none=True)
        return [self._backward(batch) for batch in batches]

    def _backward(self, batch: Batch) -> LossOutput:
        output = self.within(lambda: self._loss(batch))
        output.loss_sum.backward()
        output.loss_sum = output.loss_sum.detach()
        return output

    def move(self, weight: float) -> float:
        """See `Engine.move`."""
        parameters = [p for _, p in self._named]
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_div_(grads, weight)
        norm = torch.nn.utils.get_total_norm(grads)
        if self._clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        value = float(norm)
        if math.isfinite(value):
            self.optimizer.step()
        return value

    def total(self, values: Tensor) -> Tensor:
        """See `Engine.total`."""
        return values

    def within(self, call: Callable[[], Value]) -> Value:
        """See `Engine.within`."""
        with precision.arithmetic(self._arithmetic, device=self._device):
            return call()

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`."""
        return {name: p.detach() for name, p in self._named}

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """See `Engine.optimizer_state`."""
        return checkpoint.optimizer_state(self._module, self.optimizer)

    def load(self, weights: dict[str, Tensor], state: dict[str, dict[str, Tensor]]) -> None:
        """See `Engine.load`."""
        with torch.no_grad():
            for name, parameter in self._named:
                parameter.copy_(weights[name])
        checkpoint.load_optimizer_state(self._module, self.optimizer, state)

    def rng(self) -> dict[str, Tensor]:
        """See `Engine.rng`."""
        return checkpoint.rng_states()

    def load_rng(self, states: dict[str, Tensor]) -> bool:
        """See `Engine.load_rng`."""
        checkpoint.load_rng_states(states)
        return not any(name.startswith("rank") for name in states)

    def agree(self, failed: BaseException | None) -> None:
        """See `Engine.agree`."""
        if failed is not None:
            raise failed

    def finish(self) -> None:
        """See `Engine.finish`: nothing was changed."""
