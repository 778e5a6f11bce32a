"""The target's own weights, quantized by bitsandbytes (NF4 or int8), optionally with layers skipped, as the draft."""

import logging
from typing import Any

import torch

from inference.drafters import LoadContext
from inference.drafters.model import ModelDrafter
from inference.errors import InputError
from inference.loading import load_causal_model

_FORMATS = ("nf4", "int8")


def quantization_config(weight_format: str, *, compute_dtype: torch.dtype) -> Any:
    """transformers' configuration for a bitsandbytes format.

    Raises:
        ValueError: unknown format.
        InputError: bitsandbytes is not installed.
    """
    if weight_format not in _FORMATS:
        raise ValueError(f"unknown format {weight_format!r}; choose one of {', '.join(_FORMATS)}")
    # It proposes to fetch a kernel from a hub, which nobody here has asked for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  (transformers asks for it later, with a longer message)
    except ImportError:
        raise InputError("bitsandbytes is not installed", mend="pip install bitsandbytes, or drop this draft") from None
    from transformers import BitsAndBytesConfig

    # int8 says on every product that it casts its input; at a hundred products a pass that is no news.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if weight_format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def check_packed_step(weight_format: str, device: torch.device) -> None:
    """Refuse a format whose products, forward and backward, this build of bitsandbytes cannot do on a device; tried on
    one small layer.

    Raises:
        InputError: it cannot, or bitsandbytes is not installed.
    """
    quantization_config(weight_format, compute_dtype=torch.float32)
    import bitsandbytes

    packed: Any = bitsandbytes.nn
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        with torch.random.fork_rng([]), torch.enable_grad():
            if weight_format == "nf4":
                layer = packed.Linear4bit(128, 128, bias=False, compute_dtype=compute, quant_type="nf4").to(device)
            else:
                layer = packed.Linear8bitLt(128, 128, bias=False, has_fp16_weights=False).to(device)
            rows = torch.ones(4, 128, dtype=compute, device=device, requires_grad=True)
            layer(rows).sum().backward()
            worked = rows.grad is not None and bool(torch.isfinite(rows.grad).all())
    except Exception as error:  # whatever a build without kernels for this device throws
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        worked = False
    else:
        reason = "the gradient is not finite"
    if not worked:
        raise InputError(
            f"bitsandbytes {bitsandbytes.__version__} cannot train through {weight_format} on {device}: {reason}",
            where="bitsandbytes",
            mend="use draft.<name>.adapter=lora or target.teacher_precision=fp32",
        )


def load(spec: dict[str, object], context: LoadContext) -> ModelDrafter:
    """See `load_drafter`; quantizes the target's folder while loading, so the draft folder holds no weights."""
    kept = spec.get("kept_layers")
    try:
        kept_layers = None if kept is None else [int(i) for i in kept]  # type: ignore[attr-defined]
        compute = torch.float32 if context.device.type == "cpu" else torch.bfloat16
        config = quantization_config(str(spec.get("format")), compute_dtype=compute)
    except (TypeError, ValueError) as error:
        raise InputError(f"quantized draft: {error}", where=str(context.folder), mend="build the draft again") from None
    model = load_causal_model(
        context.target_folder,
        precision="fp32" if context.device.type == "cpu" else "bf16",
        device=context.device,
        quantization=config,
        kept_layers=kept_layers,
    )
    return ModelDrafter(model, kind="quantized")
