"""Where a target lies in a run of several processes: whole on the first one, or spread over all of them.

    with placing("auto"):
        ...  # targets that `inference.parallel.load_target` loads lie where it says

A round of a target that fits one GPU takes about three times as long when it is spread over two (docs/scale.md), so
only one that does not fit is, unless asked for. How it is spread is not known here, nor who else needs a target.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from inference import processes
from inference.precision import available_precisions, is_packed, storage_dtype

AUTO, ONE, TENSOR = "auto", "one", "tensor"
"""By size; whole on the first process; spread over all where it can be."""

_WEIGHTS_SHARE = 0.6
"""Of a device's memory, for weights; the rest is for caches, states and features of a batch."""
_WAY: ContextVar[str] = ContextVar("way", default=AUTO)


@dataclass(frozen=True)
class Placement:
    """Where a target lies.

    Attributes:
        processes: how many hold it; 1 is the first one alone.
        reason: why.
        refused: whether it would be spread if it could be.
    """

    processes: int
    reason: str
    refused: bool = False


@contextmanager
def placing(way: str, *, large: bool = False) -> Iterator[None]:
    """Decide where the targets lie that are loaded in a block; outside of one their size does.

    Args:
        way: `AUTO`, `ONE` or `TENSOR`.
        large: whether the target is said to be too large for one device.
    """
    before = _WAY.set(TENSOR if large and way == AUTO else way)
    try:
        yield
    finally:
        _WAY.reset(before)


def placement(folder: Path, *, precision: str, device: torch.device, way: str = "") -> Placement:
    """Where a target lies in one arithmetic.

    Args:
        folder: the model folder.
        precision: see `inference.precision`.
        device: where it runs, or the first part of it.
        way: in place of what `placing` says.
    """
    group, way = processes.current(), way or _WAY.get()
    if group is None or way == ONE:
        return Placement(1, "as asked for")
    reason = "as asked for"
    if way == AUTO:
        fits, reason = fits_one(folder, precision=precision, device=device, size=group.size)
        if fits:
            return Placement(1, reason)
    if obstacle := undivided(folder, size=group.size):
        return Placement(1, obstacle, refused=True)
    return Placement(group.size, reason)


def fits_one(folder: Path, *, precision: str, device: torch.device, size: int) -> tuple[bool, str]:
    """Whether one device has room for a target's weights as far as sizes tell, and the sizes in words.

    Args:
        folder: the model folder.
        precision: its arithmetic.
        device: one like those that all processes have; on a CPU the processes of a machine share its memory.
        size: how many processes there are.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here
    weights, room = weight_bytes(folder, precision=precision), _WEIGHTS_SHARE * memory
    words = f"{weights / 2**30:.2f} GiB of weights in {precision}, of at most {room / 2**30:.2f} on one device"
    return weights <= room, words


def weight_bytes(folder: Path, *, precision: str) -> int:
    """Bytes of a model folder's weights in an arithmetic, by their files' headers."""
    count = 0
    for file in folder.glob("*.safetensors"):
        weights: Any = safe_open(file, framework="pt")
        count += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())
    return count * storage_dtype(precision).itemsize


def undivided(folder: Path, *, size: int) -> str:
    """Why a target cannot be spread over so many processes, by its family or its heads; empty where it can."""
    text = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
    if not text.base_model_tp_plan:
        return f"transformers has no tensor-parallel plan for {text.model_type}"
    heads = text.num_attention_heads
    of_keys = text.to_dict().get("num_key_value_heads") or heads
    shared = math.gcd(heads, of_keys)
    if shared % size == 0:
        return ""
    fitting = [str(n) for n in range(2, shared + 1) if shared % n == 0]
    other = f" ({' or '.join(fitting)} processes would do)" if fitting else ""
    return f"{heads} heads, with {of_keys} of keys and values, cannot be shared out among {size} processes{other}"


def precisions_for(folder: Path, device: torch.device) -> list[str]:
    """Arithmetics in which a target can be loaded here, exact ones first; packed weights cannot be spread."""
    offered = available_precisions(device)
    if processes.current() is None:
        return offered
    return [
        name
        for name in offered
        if not is_packed(name) or placement(folder, precision=name, device=device).processes == 1
    ]


def holders(folder: Path, device: torch.device) -> dict[str, int]:
    """How many processes hold a target in each arithmetic that it can be loaded in."""
    names = precisions_for(folder, device)
    return {name: placement(folder, precision=name, device=device).processes for name in names}
