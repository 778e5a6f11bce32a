"""How gradients become steps: one module an engine, one process or many. Knows no loop, no schedule, no tracker.

The micro-batches of a step are dealt to the processes in turn, so what a step learns from, and the mean it takes, do
not depend on how many there are. A checkpoint holds whole tensors by name whichever engine wrote it, so a run goes on
under another engine, another ZeRO stage or another number of processes.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from torch import Tensor, optim

from train.batches import Batch
from train.results import LossOutput

Loss = Callable[[Batch], LossOutput]
Weigh = Callable[[Batch], float]
Value = TypeVar("Value")


class Engine(Protocol):
    """What the loop needs of an engine.

    Attributes:
        rank: this process, from 0.
        size: processes that train together.
        optimizer: its groups' `lr` is what the next step uses.
    """

    rank: int
    size: int
    optimizer: optim.Optimizer

    def accumulate(self, batches: Iterable[Batch]) -> list[LossOutput]:
        """Add the gradients of this process's micro-batches; losses come back without their graphs."""
        ...

    def move(self, weight: float) -> float:
        """Divide the gradients by the weight of the whole step, clip them and move the parameters.

        Returns:
            The gradient's norm before clipping. Where it is not finite the parameters were not moved, but for those of
            several processes under DeepSpeed: then only the checkpoint is good.
        """
        ...

    def total(self, values: Tensor) -> Tensor:
        """Sums over all processes of fp64 values on the CPU."""
        ...

    def within(self, call: Callable[[], Value]) -> Value:
        """Call something that uses the module as a whole, its parts gathered where they are spread."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, whole, fp32 where training is; on the first process (the others take part)."""
        ...

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state by parameter name, whole tensors; on the first process (the others take part)."""
        ...

    def load(self, weights: dict[str, Tensor], state: dict[str, dict[str, Tensor]]) -> None:
        """Put back what `weights` and `optimizer_state` gave."""
        ...

    def rng(self) -> dict[str, Tensor]:
        """Random states of all processes by name; on the first process (the others take part)."""
        ...

    def load_rng(self, states: dict[str, Tensor]) -> bool:
        """Put this process's random states back; False where they were saved by another number of processes."""
        ...

    def agree(self, failed: BaseException | None) -> None:
        """Let all processes know whether one of them failed at what only it was doing, such as writing.

        Raises:
            BaseException: `failed` itself, where it happened.
            TrainingError: on the other processes.
        """
        ...

    def finish(self) -> None:
        """Leave the module whole and ordinary, with the trained weights, on the first process."""
        ...


__all__ = ["Engine", "Loss", "Weigh"]
