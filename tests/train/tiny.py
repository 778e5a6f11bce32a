"""A tiny problem for the loop: a network with dropout (so random states matter), batches by step, a masked loss."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.batches import Batch
from train.config import TrainerConfig
from train.loop import FitResult, LossOutput, fit
from train.optimizers import adamw
from train.trackers.none import NoTracker

FEATURES, CLASSES = 6, 5


def network(seed: int = 1, dropout: float = 0.1) -> nn.Sequential:
    """A frozen embedding-like layer, dropout, a norm and a trained head."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, CLASSES)
        )
    module[0].requires_grad_(False)
    return module


def batches(step: int, micro: int) -> Batch:
    """Four examples, the same for the same step and micro-batch; the last one's weight varies."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return {
        "features": torch.randn(4, FEATURES, generator=generator),
        "labels": torch.randint(CLASSES, (4,), generator=generator),
        "weights": torch.tensor([1.0, 1.0, 1.0, float((step + micro) % 2)]),
    }


def loss_of(module: nn.Module) -> Callable[[Batch], LossOutput]:
    """Weighted cross-entropy with the number of right answers as a metric."""

    def loss(batch: Batch) -> LossOutput:
        logits = module(batch["features"])
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        right = (logits.argmax(-1) == batch["labels"]).float() * batch["weights"]
        weight = batch["weights"].sum()
        return LossOutput((losses * batch["weights"]).sum(), weight, {"accuracy": (right.sum(), weight)})

    return loss


def settings(**changes: Any) -> TrainerConfig:
    """Six steps of two micro-batches, everything saved and logged often."""
    given: dict[str, Any] = {
        "steps": 6,
        "accumulation": 2,
        "precision": "fp32",
        "log_every_steps": 4,
        "evaluate_every_steps": 3,
        "checkpoint_every_steps": 1,
        **changes,
    }
    return TrainerConfig(**given)


def run(folder: Path, module: nn.Module, **changes: Any) -> FitResult:
    """Train the tiny network; `changes` go to `fit` or, by name, to the settings."""
    names = ("batches", "loss", "optimizer", "tracker", "evaluate")
    given = {name: changes.pop(name) for name in names if name in changes}
    arguments: dict[str, Any] = {
        "batches": batches,
        "loss": loss_of(module),
        "optimizer": adamw.Config(lr=0.05),
        "tracker": NoTracker(),
        "evaluate": lambda: {"noise": float(torch.rand(()))},
        **given,
    }
    return fit(module, cfg=settings(**changes), folder=folder, **arguments)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of parameters are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":  # run by the test that kills a real process: argv = root folder, steps
    import time

    torch.set_num_threads(1)
    root = Path(sys.argv[1])

    def slow(step: int, micro: int) -> Batch:
        """Leave the killer time to strike inside a step."""
        time.sleep(float(sys.argv[3]))
        return batches(step, micro)

    run(root, network(), batches=slow, steps=int(sys.argv[2]))
