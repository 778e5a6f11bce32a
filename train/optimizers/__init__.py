"""Optimizers, one module a choice; each builds a `torch.optim.Optimizer` and knows nothing of the loop."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import nn, optim

NamedParameters: TypeAlias = "Iterable[tuple[str, nn.Parameter]]"


class OptimizerConfig(Protocol):
    """What the training loop needs of an optimizer's configuration: a dataclass that builds the optimizer."""

    def build(self, parameters: NamedParameters, /) -> "optim.Optimizer":
        """Return an optimizer over the named parameters; each group's `lr` is the base rate the schedule scales."""
        ...


__all__ = ["NamedParameters", "OptimizerConfig"]
