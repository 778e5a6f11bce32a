"""What a device's matrix units can do at most, by its name: dense products, from data sheets. Nothing is measured.

device_peak_flops(torch.device("cuda"), "bf16")    # 989e12 on an H100 SXM, None on a CPU
"""

import torch

PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("H100 PCIe", {"bf16": 756, "tf32": 378, "fp32": 51}),
    ("H100 NVL", {"bf16": 835, "tf32": 418, "fp32": 60}),
    ("H200 NVL", {"bf16": 835, "tf32": 418, "fp32": 60}),
    ("H100", {"bf16": 989, "tf32": 494, "fp32": 67}),
    ("H200", {"bf16": 989, "tf32": 494, "fp32": 67}),
    ("A100", {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    ("L40S", {"bf16": 362, "tf32": 183, "fp32": 91.6}),
    ("RTX 4090", {"bf16": 165, "tf32": 82.6, "fp32": 82.6}),
)
"""Part of a device's name, and its peaks in 10^12 operations a second without sparsity; the first that fits counts."""

_SLICE = "MIG"


def named_peak(name: str, arithmetic: str) -> float | None:
    """Operations a second of a device of this name; None for a slice of one and for those not in the table.

    Args:
        name: as the driver gives it, "NVIDIA H100 80GB HBM3".
        arithmetic: "bf16", "tf32" or "fp32".
    """
    if _SLICE in name:
        return None
    return next((1e12 * peaks[arithmetic] for part, peaks in PEAKS if part in name), None)


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second of a device in the arithmetic of training; None where they are not known, as on a CPU.

    Args:
        device: that trains.
        precision: "fp32" (TF32 where torch is told to use it) or "bf16".
    """
    if device.type != "cuda":
        return None
    rounded = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return named_peak(torch.cuda.get_device_name(device), "tf32" if rounded else precision)


__all__ = ["PEAKS", "device_peak_flops", "named_peak"]
