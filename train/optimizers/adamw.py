"""AdamW in full precision (Loshchilov and Hutter 2017, arXiv 1711.05101): two fp32 numbers of state a weight."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.optimizers import NamedParameters
from train.optimizers._groups import check_options, parameter_groups

if TYPE_CHECKING:
    from torch import optim


@dataclass
class Config:
    """Options of AdamW.

    Attributes:
        kind: name of this plug-in.
        lr: base learning rate, scaled by the schedule.
        weight_decay: decoupled decay of matrices; biases and norms never decay.
        beta1: memory of the mean gradient.
        beta2: memory of the mean squared gradient.
        eps: added to the root of the second moment.
        fused: use torch's fused kernel (CPU and CUDA): one pass over the weights instead of many.
    """

    kind: str = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    fused: bool = True

    def __post_init__(self) -> None:
        check_options(
            self.kind, lr=self.lr, weight_decay=self.weight_decay, beta1=self.beta1, beta2=self.beta2, eps=self.eps
        )

    def build(self, parameters: NamedParameters, /) -> "optim.Optimizer":
        """Return the optimizer over the named parameters."""
        from torch import optim

        return optim.AdamW(
            parameter_groups(parameters, weight_decay=self.weight_decay),
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=self.fused,
        )
