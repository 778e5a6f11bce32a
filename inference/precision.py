"""Arithmetics on offer for a forward pass, and how a loaded model is put into one. `device_profile` chooses.

`fp32` and `bf16` are torch's own. `fp32_packed` and `bf16_packed` keep the weights in oneDNN's blocked layout: the same
arithmetic, without the reordering that a plain product of a few rows pays every time. `fp16_packed` keeps weights in
half precision in FBGEMM's layout and computes in fp32: half the memory traffic on CPUs without bf16 instructions.
`packed_by_rows` holds both halves: few rows go through the fp16 product, which is the faster one there, many
rows through the bf16 one, and everything between products is fp32. Twice the weights in memory, and the best of both.

Packed layers that read the same tensor one after another (queries, keys, values; gate and up) are one product: a
product of few rows is paid for by the call and by how evenly its columns go over the cores.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from inference.precisions import PRECISIONS

_STORED = {"bf16": torch.bfloat16, "bf16_packed": torch.bfloat16, "fp16": torch.float16}
_PACKED_ROWS_HINT = 8
# oneDNN's bf16 kernels take about as long for one row as for eight, FBGEMM's grow row by row; they cross at nine or so.
_FEW_ROWS = 8
_READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def available_precisions(device: torch.device) -> list[str]:
    """Arithmetics that run on a device, exact ones first."""
    if device.type != "cpu":
        return ["fp32", "bf16", "fp16"]
    names = ["fp32"]
    blocked = torch.backends.mkldnn.is_available()
    if blocked:
        names.append("fp32_packed")
    if "fbgemm" in torch.backends.quantized.supported_engines:
        names.append("fp16_packed")
    names.append("bf16")
    # oneDNN refuses to lay out bf16 weights where it would have to emulate their products.
    if blocked and has_bf16_products():
        names.append("bf16_packed")
        if "fp16_packed" in names:
            names.append("packed_by_rows")
    return names


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 by instructions of its own instead of emulating it."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


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


class RowsLinear(nn.Module):
    """`x W^T + b`, x `[..., in]` in fp32: up to eight rows by half-precision weights in fp32, more by bf16 products."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.few = PackedHalfLinear(linear)
        halved = nn.Linear(1, 1, bias=False)
        halved.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        if linear.bias is not None:
            halved.bias = nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)
        self.many = BlockedLinear(halved)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., out]` in fp32."""
        # Past the modules' own call: two hundred of them are a tenth of a pass of one row.
        if x.numel() <= _FEW_ROWS * x.shape[-1]:
            return self.few.forward(x)
        return self.many.forward(x.bfloat16()).float()


class SharedProduct:
    """The product of several linear layers with one input, computed when the first asks, kept until the last has.

    Args:
        product: of the layers' stacked weights, `[..., in]` to `[..., sum of out]`.
        parts: number of layers.
    """

    def __init__(self, product: nn.Module, *, parts: int) -> None:
        self.product, self.parts = product, parts
        self._multiply: Callable[[torch.Tensor], torch.Tensor] = product.forward
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._asked: set[int] = set()

    def of(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """The whole product of `x`, asked for by one of the layers."""
        # The very tensor: an equal one, or the same storage written anew, is another input.
        if self._output is None or x is not self._input or part in self._asked:
            self._input, self._output, self._asked = x, self._multiply(x), set()
        output = self._output
        self._asked.add(part)
        if len(self._asked) == self.parts:
            self._input = self._output = None
        return output


class PartLinear(nn.Module):
    """One of the layers of a `SharedProduct`: its columns, `[..., out]`."""

    def __init__(self, shared: SharedProduct, *, part: int, start: int, width: int) -> None:
        super().__init__()
        self.shared, self.part, self.start, self.width = shared, part, start, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., out]`, a view."""
        return self.shared.of(x, self.part).narrow(-1, self.start, self.width)


_Packer = type[PackedHalfLinear] | type[BlockedLinear] | type[RowsLinear]
_PACKERS: dict[str, _Packer] = {
    "fp16_packed": PackedHalfLinear,
    "packed_by_rows": RowsLinear,
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
            for names in _READ_TOGETHER:
                _pack_together(parent, names, packer)
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    packed = shared.setdefault(id(child.weight), packer(child))
                    setattr(parent, name, packed)


def _pack_together(parent: nn.Module, names: Sequence[str], packer: _Packer) -> None:
    """Replace these children by parts of one product, where all are there and alike."""
    there = dict(parent.named_children())
    children = [there[name] for name in names if name in there]
    linear = [child for child in children if type(child) is nn.Linear]
    if len(linear) < len(names) or len({(child.in_features, child.bias is None) for child in linear}) > 1:
        return
    weights = [child.weight for child in linear]
    stacked = nn.Linear(1, 1, bias=False, device=weights[0].device)
    stacked.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if linear[0].bias is not None:
        stacked.bias = nn.Parameter(torch.cat([child.bias for child in linear]), requires_grad=False)
    shared, start = SharedProduct(packer(stacked), parts=len(names)), 0
    for part, (name, child) in enumerate(zip(names, linear, strict=True)):
        setattr(parent, name, PartLinear(shared, part=part, start=start, width=child.out_features))
        start += child.out_features


def model_nbytes(model: nn.Module) -> int:
    """Bytes of weights: parameters and buffers counted once, packed weights included."""
    shared = {id(m.shared): m.shared.product for m in model.modules() if isinstance(m, PartLinear)}
    modules = [*model.modules(), *(part for product in shared.values() for part in product.modules())]
    tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    seen = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    packed = {id(m): m.num_bytes for m in modules if isinstance(m, PackedHalfLinear | BlockedLinear)}
    return sum(seen.values()) + sum(packed.values())
