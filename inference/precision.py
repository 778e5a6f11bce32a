"""Arithmetics on offer for a forward pass, and how a loaded model is put into one. `device_profile` chooses.

`fp32` and `bf16` are torch's own. `fp32_packed` and `bf16_packed` keep the weights in oneDNN's blocked layout: the same
arithmetic, without the reordering that a plain product of a few rows pays every time. `fp16_packed` keeps weights in
half precision in FBGEMM's layout and computes in fp32: half the memory traffic on CPUs without bf16 instructions.
"""

import torch
from torch import nn

from inference.processes import num_processes

PRECISIONS = ("fp32", "fp32_packed", "bf16", "bf16_packed", "fp16_packed", "fp16")
_STORED = {"bf16": torch.bfloat16, "bf16_packed": torch.bfloat16, "fp16": torch.float16}
_PACKED_ROWS_HINT = 8


def available_precisions(device: torch.device) -> list[str]:
    """Arithmetics that run on a device, exact ones first; packed weights cannot be spread over several processes."""
    if device.type != "cpu":
        return ["fp32", "bf16", "fp16"]
    if num_processes() > 1:
        return ["fp32", "bf16"]
    names = ["fp32"]
    blocked = torch.backends.mkldnn.is_available()
    if blocked:
        names.append("fp32_packed")
    if "fbgemm" in torch.backends.quantized.supported_engines:
        names.append("fp16_packed")
    names.append("bf16")
    # oneDNN refuses to lay out bf16 weights where it would have to emulate their products.
    if blocked and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        names.append("bf16_packed")
    return names


def is_packed(precision: str) -> bool:
    """Whether the linear layers' weights are laid out anew, so that they are parameters no longer."""
    return precision in _PACKERS


def storage_dtype(precision: str) -> torch.dtype:
    """Dtype in which weights are loaded before `apply_precision`."""
    return _STORED.get(precision, torch.float32)


class PackedHalfLinear(nn.Module):
    """`x W^T + b` with half-precision weights and fp32 arithmetic (FBGEMM); x is `[..., in]` in fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.float(), bias)
        self.num_bytes = 2 * linear.weight.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., out]` in fp32."""
        product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return product


class BlockedLinear(nn.Module):
    """`x W^T + b` with weights in oneDNN's blocked layout; x is `[..., in]` in the weights' dtype, fp32 or bf16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKED_ROWS_HINT)
        self.bias = linear.bias
        self.num_bytes = linear.weight.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., out]` in the weights' dtype."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product


_PACKERS: dict[str, type[PackedHalfLinear] | type[BlockedLinear]] = {
    "fp16_packed": PackedHalfLinear,
    "fp32_packed": BlockedLinear,
    "bf16_packed": BlockedLinear,
}


def apply_precision(model: nn.Module, precision: str) -> None:
    """Put a model that was loaded in `storage_dtype(precision)` into an arithmetic, in place.

    A packed model can no longer be trained or saved; linear layers that share a weight are packed once.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    packer = _PACKERS.get(precision)
    if packer is None:
        return
    shared: dict[int, nn.Module] = {}
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    packed = shared.setdefault(id(child.weight), packer(child))
                    setattr(parent, name, packed)


def model_nbytes(model: nn.Module) -> int:
    """Bytes of weights: parameters and buffers counted once, packed weights included."""
    seen = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    packed = {id(m): m.num_bytes for m in model.modules() if isinstance(m, PackedHalfLinear | BlockedLinear)}
    return sum(seen.values()) + sum(packed.values())
