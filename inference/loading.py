"""From an ordinary Hugging Face folder to a `CausalModel`: safetensors only, no remote code, whole or refused.

Runs nothing; what a model does once it is loaded is `inference.model`.
"""

import copy
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from inference.attention import use_grouped_attention
from inference.errors import InputError, first_line
from inference.layers import AbsentLayer, decoder_layers, keep_layers
from inference.lean import use_lean_layers
from inference.model import CausalModel
from inference.precision import apply_precision, storage_dtype
from inference.processes import is_loss

# Rows of a 4-bit weight that bitsandbytes lays out together on a CPU.
_REPACKED_ROWS = 32


def load_causal_model(
    folder: Path,
    *,
    precision: str,
    device: torch.device,
    attention: str = "sdpa",
    quantization: Any = None,
    kept_layers: list[int] | None = None,
) -> CausalModel:
    """Load an ordinary Hugging Face causal LM folder (safetensors only, no remote code).

    Args:
        folder: the model folder.
        precision: see `inference.precision`.
        device: where it runs.
        attention: transformers' attention implementation.
        quantization: a transformers quantization configuration, or None.
        kept_layers: decoder layers to keep, in order; None keeps all.

    Raises:
        InputError: missing folder, missing, truncated, incomplete or non-finite weights.
    """
    check_model_folder(folder)
    device_map = {"": str(device)} if quantization is not None else None
    model = load_pretrained(
        folder, precision=precision, attention=attention, quantization_config=quantization, device_map=device_map
    )
    check_finite(model, where=str(folder))
    if kept_layers is not None:
        keep_layers(model, kept_layers)
    if quantization is None:
        nn.Module.to(model, device)
        apply_precision(model, precision)
    elif device.type == "cpu":
        _leave_unpacked(model)
    use_grouped_attention(model)
    if quantization is None:
        use_lean_layers(model)
    return CausalModel(model, folder=folder, precision=precision)


def load_ends(folder: Path, *, precision: str, device: torch.device, last_layers: int = 0) -> CausalModel:
    """A model's embedding, final norm and head, for who runs no layers: of the weights only these and a layer's or two
    are read.

    Args:
        folder: the model folder.
        precision: see `inference.precision`.
        device: where it runs.
        last_layers: decoder layers at the end that keep their weights, for who starts from them; in the others' places
            is nothing that runs.

    Raises:
        InputError: as `load_causal_model`; or the weights do not name their layers as the model does.
    """
    check_model_folder(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text = config.get_text_config(decoder=True)
    count, kinds = text.num_hidden_layers, getattr(text, "layer_types", None)
    _say_layers(text, 1, kinds)
    model = load_pretrained(folder, precision=precision, attention="sdpa", config=config)
    stack = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    kept = range(count - min(last_layers, count), count)
    layers = {index: _layer_of(folder, f"{prefix}.{index}.", like=stack[0]) for index in kept}
    del stack[:]
    stack.extend(layers.get(index, AbsentLayer()) for index in range(count))
    _say_layers(model.config.get_text_config(decoder=True), count, kinds)
    check_finite(model, where=str(folder))
    nn.Module.to(model, device)
    apply_precision(model, precision)
    return CausalModel(model, folder=folder, precision=precision)


def _say_layers(text: Any, count: int, kinds: list[str] | None) -> None:
    """Let a text configuration speak of so many layers."""
    text.num_hidden_layers = count
    if kinds is not None:
        text.layer_types = kinds[:count]


def _layer_of(folder: Path, prefix: str, *, like: nn.Module) -> nn.Module:
    """A decoder layer with the weights that a folder's files hold under a prefix.

    Raises:
        InputError: one of them is not there.
    """
    layer = copy.deepcopy(like)
    wanted, found = {prefix + name: parameter for name, parameter in layer.named_parameters()}, set[str]()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            for name in wanted.keys() & set(tensors.keys()):
                wanted[name].copy_(tensors.get_tensor(name))
                found.add(name)
    if missing := sorted(wanted.keys() - found):
        raise InputError(
            f"no tensor {missing[0]}", where=str(folder), mend="load the model whole, or fetch the folder again"
        )
    return layer


def _leave_unpacked(model: nn.Module) -> None:
    """Let 4-bit layers alone that bitsandbytes cannot repack.

    On CPUs with bf16 instructions it repacks such a weight in its first pass, and fails where the width is no multiple
    of the block that shares a scale, or the height none of its own 32 rows.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            if module.in_features % weight.quant_state.blocksize or module.out_features % _REPACKED_ROWS:
                module.support_avx512bf16_for_cpu = False


def load_pretrained(folder: Path, *, precision: str, attention: str, **options: Any) -> PreTrainedModel:
    """The transformers model of a folder, whole or refused.

    Args:
        folder: a folder that `check_model_folder` has passed.
        precision: decides the dtype of the weights.
        attention: transformers' attention implementation.
        options: for `from_pretrained`.

    Raises:
        InputError: transformers cannot load it, or weights are missing.
    """
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                dtype=storage_dtype(precision),
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            if is_loss(error):
                raise
            raise InputError(
                f"cannot load the model: {first_line(error)}",
                where=str(folder),
                mend="check or fetch the folder again",
            ) from None
    model: PreTrainedModel = loaded[0]
    # transformers would fill what is missing with random numbers and say so in a notice.
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise InputError(
            f"the weights lack {len(missing)} tensors, for example {missing[0]}",
            where=str(folder),
            mend="fetch or build the folder again",
        )
    return model


def check_model_folder(folder: Path) -> None:
    """Refuse, before anything is loaded, a folder that is no whole model.

    Raises:
        InputError: no folder, no configuration, no safetensors, or a file shorter than its own header says.
    """
    if not folder.is_dir():
        raise InputError("no such model folder", where=str(folder), mend="give a folder or an id that exists")
    if not (folder / "config.json").is_file():
        raise InputError("no config.json here", where=str(folder), mend="point at a Hugging Face model folder")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"config.json is off: {first_line(error)}", where=str(folder), mend="fetch it again") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError("no safetensors weights here", where=str(folder), mend="convert the weights to safetensors")
    for file in files:
        expected, actual = _safetensors_bytes(file), file.stat().st_size
        if expected is None:
            raise InputError("not a safetensors file", where=str(file), mend="fetch or build it again")
        if expected != actual:
            raise InputError(
                f"truncated weights: {actual} bytes where its header promises {expected}",
                where=str(file),
                mend="fetch or build it again",
            )


def check_finite(model: nn.Module, *, where: str) -> None:
    """Refuse weights with NaN or infinity, of those that lie in this process.

    Raises:
        InputError: naming the first such tensor.
    """
    for name, parameter in model.named_parameters():
        tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"NaN or infinite weights in {name}", where=where, mend="fetch or build it again")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notices off the terminal while a model loads or is saved."""
    if not torch.cuda.is_available():
        # On saving, accelerate looks whether DeepSpeed has wrapped the model, and DeepSpeed says that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _safetensors_bytes(file: Path) -> int | None:
    """Size a safetensors file must have by its own header; None when the header itself is off."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return None
        (length,) = struct.unpack("<Q", prefix)
        if length > file.stat().st_size:
            return 8 + int(length)
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None
    return 8 + int(length) + max(ends, default=0)
