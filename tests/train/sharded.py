"""A process of a distributed run of the tiny problem: torchrun starts it, argv = JSON of what to do.

The network has a part that is used apart from its own `forward`, frozen parameters and a parameter of its own beside
its parts: what ZeRO stage 3 has to gather by name.
"""

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.train import tiny
from train import checkpoint
from train.batches import Batch
from train.config import TrainerConfig
from train.engines import zero
from train.engines.replicated import ReplicatedEngine
from train.errors import TrainingError
from train.loop import FitResult, LossOutput, fit
from train.optimizers import adamw
from train.signals import Stopped
from train.trackers.none import NoTracker


class Lines:
    """A tracker that keeps what it is told of steps."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        self.lines.append(metrics)

    def artifact(self, made: object, /, *, uses: object, metadata: object) -> None:
        pass

    def finish(self) -> None:
        pass


class Network(nn.Module):
    """Frozen input, layers, a scale of its own, and a head whose weight is read directly."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            self.frozen = nn.Linear(tiny.FEATURES, 16).requires_grad_(False)
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16))
            self.norm = nn.LayerNorm(16)
            self.scale = nn.Parameter(torch.ones(16))
            self.head = nn.Linear(16, tiny.CLASSES)
        self.learns_scale = True

    def loss(self, batch: Batch) -> LossOutput:
        batch = {name: tensor.to(self.scale.device) for name, tensor in batch.items()}
        scale = self.scale if self.learns_scale else self.scale.detach()
        hidden = self.norm(self.layers(self.frozen(batch["features"]))) * scale
        head = {name: p.to(hidden.dtype) for name, p in self.head.named_parameters()}
        logits = nn.functional.linear(hidden, head["weight"], head["bias"])
        losses = nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="none")
        right = (logits.argmax(-1) == batch["labels"]).float() * batch["weights"]
        weight = batch["weights"].sum()
        return LossOutput((losses * batch["weights"]).sum(), weight, {"accuracy": (right.sum(), weight)})


def batches(step: int, micro: int) -> Batch:
    """Micro-batches whose weights differ by far, so that a mean of means is not the true mean."""
    batch = tiny.batches(step, micro)
    return {**batch, "weights": batch["weights"] * (1.0 + 5.0 * (micro % 2))}


def weigh(batch: Batch) -> float:
    return float(batch["weights"].sum())


def mutate(module: Network, mutant: str) -> None:
    """Break something that tests are to notice; some of it on the last of two processes alone."""
    last = os.environ.get("RANK") == "1"
    if mutant == "mean of means":
        right = zero.ZeroEngine._backward
        zero.ZeroEngine._backward = lambda self, batch, share: right(self, batch, share * 7.0 / weigh(batch))
    if mutant == "gradients are not summed":
        ReplicatedEngine._sum_gradients = lambda self: None
    if mutant == "other parameters":
        module.learns_scale = not last
    if mutant == "nan" and last:
        calls = iter(range(1000))
        # Two micro-batches a step are its own: the seventh is of the fourth step.
        module.scale.register_hook(lambda grad: grad * float("nan") if next(calls) == 6 else grad)


def train(
    folder: Path,
    *,
    dropout: float = 0.0,
    pause: float = 0.0,
    mutant: str = "",
    device: str = "cpu",
    tracker: Lines | None = None,
    **changes: Any,
) -> tuple[Network, FitResult]:
    """Train it; `changes` go to the settings. What it had learnt when it failed is left in the folder."""
    module = Network(dropout).to(device)
    mutate(module, mutant)
    captured = changes.get("captured") == "on"

    def slow(step: int, micro: int) -> Batch:
        time.sleep(pause)
        return batches(step, micro)

    given: dict[str, Any] = {
        "steps": 6,
        "accumulation": 4,
        "precision": "fp32",
        "log_every_steps": 1,
        "checkpoint_every_steps": 1,
        "clip_norm": 0.5,
        **changes,
    }
    try:
        result = fit(
            module,
            batches=slow,
            loss=module.loss,
            optimizer=adamw.Config(lr=0.02),
            cfg=TrainerConfig(**given),
            folder=folder,
            tracker=tracker or NoTracker(),
            evaluate=lambda: {"loss": float(module.loss(batches(99, 0)).loss_sum)},
            weigh=weigh,
            used_apart=[module.head] if mutant != "the head is not gathered" else [],
            ahead=captured,
            fixed_shapes=captured,
        )
    except TrainingError:
        save_file(tiny.weights(module), folder / f"left-{os.environ.get('RANK', 0)}.safetensors")
        raise
    return module, result


def fill_the_disk(step: int) -> None:
    """Let checkpoints from a step on find no room."""
    write = checkpoint.write_snapshot

    def full(root: Path, snapshot: checkpoint.Snapshot) -> Path:
        if snapshot.step >= step:
            raise OSError(errno.ENOSPC, "No space left on device", str(root))
        return write(root, snapshot)

    checkpoint.write_snapshot = full


def main() -> int:
    """Train as told, and leave what came out."""
    told = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    zero.PERSISTENT_NUMBERS = 0  # everything is spread, however small
    rank = int(os.environ.get("RANK", 0))
    if told.get("device") == "cuda":
        torch.cuda.set_device(rank)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if told.get("device") == "cuda" else "gloo")
    folder = Path(told.pop("folder"))
    # As in a real run, the first process alone has a tracker.
    tracker = Lines() if told.pop("tracked", False) and rank == 0 else None
    if full_at := told.pop("full_at", 0):
        fill_the_disk(full_at)
    try:
        module, result = train(folder, tracker=tracker, **{"engine": "deepspeed", **told})
    except Stopped as stopped:
        sys.stdout.write(f"stopped at {stopped.step}\n")
        return _part(143)
    if rank == 0:
        save_file({name: p.cpu() for name, p in tiny.weights(module).items()}, folder / "weights.safetensors")
        text = {"history": result.history, "resumed": result.resumed_step, "tokens": result.tokens}
        text["tracked"] = tracker.lines if tracker else []
        (folder / "result.json").write_text(json.dumps(text))
    return _part(0)


def _part(code: int) -> int:
    """Leave the others in good order, and at once: libraries that are taken down with threads running abort."""
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
