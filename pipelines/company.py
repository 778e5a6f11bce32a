"""The processes that work together, as each of them sees the others. One without a group is alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from inference.processes import Group
from inference.sharded import agreed
from pipelines.config import RunConfig

Result = TypeVar("Result")


@dataclass(frozen=True)
class Company:
    """The processes that work together; one without a group is alone."""

    group: Group | None = None

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return self.group.rank if self.group else 0

    @property
    def size(self) -> int:
        """How many they are."""
        return self.group.size if self.group else 1

    def together(self, work: Callable[[], Result]) -> Result:
        """This process's part of some work; done when all have done theirs.

        Raises:
            InputError: this process refuses, or another one.
        """
        return agreed(self.group, work) if self.group else work()

    def of_first(self, decided: str) -> str:
        """What the first process decided."""
        return self.group.lines(decided)[0] if self.group else decided

    def of_all(self, said: str) -> list[str]:
        """What every process says, in the order of ranks."""
        return self.group.lines(said) if self.group else [said]

    def device(self, cfg: RunConfig) -> torch.device:
        """The device asked for; of several processes each has a GPU of its own."""
        return self.own(cfg.target.torch_device())

    def own(self, device: torch.device) -> torch.device:
        """This process's own GPU in place of a GPU, if there are several processes."""
        if self.group and device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        return device
