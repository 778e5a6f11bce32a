"""Number formats of training: fp32, or bf16 arithmetic over fp32 master weights. No loss scaling: bf16 needs none."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def arithmetic(precision: str, *, device: torch.device) -> AbstractContextManager[object]:
    """Return the context the forward pass runs in: autocast to bf16, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def master_weights(module: nn.Module) -> None:
    """Turn trainable half-precision parameters into fp32, in place; frozen ones keep their format.

    An update of 1e-4 of a weight is lost when added to a bf16 weight (8 bits of mantissa); fp32 keeps it.
    """
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
