"""AdamW with 8-bit state from bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861): 2 bytes of state a weight.

Runs on CUDA and, in bitsandbytes 0.50, on the CPU as well; which devices work depends on the installed build, so one
step is tried on the parameters' own device before training starts.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.errors import TrainingError
from train.optimizers import NamedParameters
from train.optimizers._groups import check_options, parameter_groups

if TYPE_CHECKING:
    import torch
    from torch import optim

_LOG = logging.getLogger(__name__)


@dataclass
class Config:
    """Options of the 8-bit AdamW.

    Attributes:
        kind: name of this plug-in.
        lr: base learning rate, scaled by the schedule.
        weight_decay: decoupled decay of matrices; biases and norms never decay.
        beta1: memory of the mean gradient.
        beta2: memory of the mean squared gradient.
        eps: added to the root of the second moment.
        min_8bit_size: tensors with fewer numbers than this keep 32-bit state.
    """

    kind: str = "adamw8bit"
    lr: float = 3e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    min_8bit_size: int = 4096

    def __post_init__(self) -> None:
        check_options(
            self.kind, lr=self.lr, weight_decay=self.weight_decay, beta1=self.beta1, beta2=self.beta2, eps=self.eps
        )
        if self.min_8bit_size < 1:
            raise ValueError(f"optimizer adamw8bit: min_8bit_size is {self.min_8bit_size}: choose at least 1")

    def build(self, parameters: NamedParameters, /) -> "optim.Optimizer":
        """Return the optimizer over the named parameters.

        Raises:
            TrainingError: bitsandbytes is missing, or its build cannot take an 8-bit step on the parameters' device.
        """
        named = list(parameters)
        for device in sorted({p.device for _, p in named}, key=str):
            self.check(device)
        return self._make(parameter_groups(named, weight_decay=self.weight_decay), self.min_8bit_size)

    def _make(self, groups: list[dict[str, Any]], min_8bit_size: int) -> "optim.Optimizer":
        optimizer: optim.Optimizer = _bitsandbytes().optim.AdamW8bit(
            groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, min_8bit_size=min_8bit_size
        )
        return optimizer

    def check(self, device: "torch.device") -> None:
        """Take one real 8-bit step on a small parameter of zeros; touches no random state.

        Raises:
            TrainingError: bitsandbytes is missing, or its build cannot take the step.
        """
        import torch

        probe = torch.nn.Parameter(torch.zeros(512, device=device))
        probe.grad = torch.ones_like(probe)
        version = _bitsandbytes().__version__
        try:
            optimizer = self._make([{"params": [probe], "weight_decay": 0.0}], 1)
            optimizer.step()
            moved = bool((probe.detach() < 0).all()) and optimizer.state[probe]["state1"].dtype == torch.uint8
        except Exception as error:
            raise _refusal(version, device, f"{type(error).__name__}: {error}") from error
        if not moved:
            raise _refusal(version, device, "the trial step left the weights as they were")
        _LOG.info("8-bit AdamW: bitsandbytes %s took a trial step on %s", version, device)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise TrainingError(
            "optimizer adamw8bit needs the package bitsandbytes", mend="install it, or use optimizer=adamw"
        ) from error
    return bitsandbytes


def _refusal(version: str, device: "torch.device", reason: str) -> TrainingError:
    return TrainingError(
        f"bitsandbytes {version} cannot take an 8-bit step: {reason}",
        where=f"device {device}",
        mend="use optimizer=adamw",
    )
