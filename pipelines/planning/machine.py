"""The machines a plan is for: as described in the configuration, or this one, measured."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from inference.device_profile import DeviceProfile, device_profile
from pipelines.config import RunConfig

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What a run is given.

    Attributes:
        name: for people.
        device: "cpu" or "cuda"; on a CPU the processes of a node share its memory.
        nodes: machines.
        processes: training processes on each of them.
        memory: bytes of one process's device.
        host: bytes of one node's own memory.
        disk: bytes of room for artifacts.
        arithmetic: of training, "fp32" or "bf16".
        flops: operations a second that training reaches on one device; 0 where `profile` says what it costs.
        profile: measured on this machine; None for one that is described.
    """

    name: str
    device: str
    nodes: int
    processes: int
    memory: float
    host: float
    disk: float
    arithmetic: str
    flops: float
    profile: DeviceProfile | None

    @property
    def size(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.processes


def described(cfg: RunConfig) -> Machine:
    """The machines of the configuration; with `plan.tflops` of 0 this one, by its device profile.

    Raises:
        InputError: the profile cannot be measured, because the target's files are not to be had.
    """
    plan = cfg.plan
    measured = not plan.tflops
    profile = device_profile(cfg.target, cfg.paths.cache) if measured else None
    device = cfg.target.torch_device().type if measured else "cuda"
    fastest = profile.train_precision if profile else "bf16"
    host = GIB * plan.host_gib or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    name = profile.device if profile else f"{plan.tflops:g} TFLOP/s at {100 * plan.mfu:.0f} %"
    return Machine(
        name=f"{plan.nodes} x {plan.processes} x {name}" if plan.nodes * plan.processes > 1 else name,
        device=device,
        nodes=plan.nodes,
        processes=plan.processes,
        memory=GIB * plan.memory_gib or (_gpu_bytes() if device == "cuda" else host / plan.processes),
        host=host,
        disk=GIB * plan.disk_gib or float(_free(cfg.paths.artifacts)),
        arithmetic=fastest if cfg.trainer.precision == "auto" else cfg.trainer.precision,
        flops=plan.tflops * 1e12 * plan.mfu,
        profile=profile,
    )


def _gpu_bytes() -> float:
    """Memory of this machine's first GPU; without one nothing is known, and nothing is too large."""
    return float(torch.cuda.mem_get_info(0)[1]) if torch.cuda.is_available() else float("inf")


def _free(folder: Path) -> int:
    """Free bytes where a folder is or will be."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free
