"""Spreading over processes by DeepSpeed, without training: the package, what can be shared out, frozen modules."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from train.errors import TrainingError
from train.optimizers import OptimizerConfig

NEVER = 10**9
"""Steps between two of DeepSpeed's own reports."""


def check_spread(optimizer: OptimizerConfig, *, accumulation: int, size: int, stage: int) -> None:
    """Refuse what cannot be shared out.

    Raises:
        TrainingError: micro-batches that do not go round, or 8-bit state.
    """
    if accumulation % size:
        raise TrainingError(
            f"{accumulation} micro-batches a step cannot be dealt to {size} processes",
            where="trainer.accumulation",
            mend=f"use a multiple of {size}: the micro-batches of a step are those of all processes together",
        )
    if stage and getattr(optimizer, "kind", "") == "adamw8bit":
        raise TrainingError(
            "8-bit optimizer state cannot be spread: its blocks would cross the parts",
            where="optimizer",
            mend="use optimizer=adamw (ZeRO spreads its state), or trainer.zero_stage=0",
        )


def spread_frozen(module: nn.Module) -> None:
    """Spread a module that is never trained over all processes, in place: each layer is gathered when it is called.

    All processes call it the same number of times, without gradients.
    """
    deepspeed = deepspeed_package()
    join(module)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "steps_per_print": NEVER}
    with quiet():
        deepspeed.initialize(model=module, config=settings)


def join(module: nn.Module) -> None:
    """Make this process a group of one where torchrun started none."""
    if not distributed.is_initialized():
        on_gpu = any(p.device.type == "cuda" for p in module.parameters())
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def deepspeed_package() -> Any:
    """The package, quiet; its operators are not compiled, torch's are used."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with quiet():
            import deepspeed
    except ImportError as error:
        raise TrainingError("trainer=deepspeed needs the package deepspeed", mend="install it") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Without a GPU it would compile a kernel for small sums, for inference: gloo does without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def quiet() -> Iterator[None]:
    """Keep notices to DeepSpeed's authors off the user's terminal: it asks torch by older names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


__all__ = ["NEVER", "check_spread", "deepspeed_package", "join", "quiet", "spread_frozen"]
