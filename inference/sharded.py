"""One process's part of a target that transformers has spread over several: loading it, and gathering what is wanted
whole. Says nothing of who leads.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from inference import processes
from inference.attention import use_grouped_attention
from inference.errors import InputError
from inference.loading import check_finite, check_model_folder, load_pretrained

Result = TypeVar("Result")


def load_part(group: processes.Group, folder: Path, *, precision: str, attention: str) -> PreTrainedModel:
    """This process's part of a target.

    Raises:
        InputError: this process cannot load its part, or another one cannot.
    """

    def load() -> PreTrainedModel:
        spread = DistributedConfig(tp_plan="auto", tp_size=group.size)
        model = load_pretrained(folder, precision=precision, attention=attention, distributed_config=spread)
        check_finite(model, where=str(folder))
        use_grouped_attention(model)
        _limit_waits(model)
        return model

    # Loading begins with a meeting, at which a process without the folder would be waited for in vain.
    agreed(group, lambda: check_model_folder(folder))
    return agreed(group, load)


def agreed(group: processes.Group, work: Callable[[], Result]) -> Result:
    """What this process's share of some work gives, unless one of the processes refuses its own.

    Raises:
        InputError: this process refuses, or another one.
    """
    refusal, result = "", []
    try:
        with group.together():
            result.append(work())
    except InputError as error:
        refusal = str(error)
    for rank, said in enumerate(group.lines(refusal)):
        if said:
            raise InputError(said if rank == group.rank else f"process {rank} cannot do its part: {said}")
    return result[0]


def _limit_waits(model: nn.Module) -> None:
    """Let no process wait for another within a pass for longer than `processes.PATIENCE`."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            distributed_c10d._set_pg_timeout(processes.PATIENCE, parameter.device_mesh.get_group())
            return


def gathered(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's whole parameters by name; a collective operation."""
    with torch.no_grad():
        return {
            name: _waited(parameter.full_tensor()) if isinstance(parameter, DTensor) else parameter
            for name, parameter in module.named_parameters()
        }


def bare(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str = "") -> nn.Module:
    """A copy of a sharded module that computes by itself, from whole parameters; buffers are shared."""
    copied = copy.copy(module)
    parts = vars(copied)
    parts.pop("forward", None)  # transformers hangs the plan's communication there
    parts["_parameters"] = {
        name: None if owned is None else nn.Parameter(tensors[prefix + name], requires_grad=False)
        for name, owned in module._parameters.items()
    }
    parts["_modules"] = {
        name: None if child is None else bare(child, tensors, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return copied


def settled(output: Any) -> Any:
    """A model's output with plain tensors: what is still on its way from other processes is waited for."""
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            output[name] = _waited(value)
    return output


def _waited(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    return tensor
