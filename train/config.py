"""Settings of the training loop. What is trained, on what and by which optimizer is decided elsewhere."""

from dataclasses import asdict, dataclass
from typing import Any

from train.schedule import SCHEDULES

# Settings that do not change the weights a run ends with; a run may be resumed with others.
_FREE = (
    "checkpoint_every_steps",
    "keep_checkpoints",
    "engine",
    "zero_stage",
    "offload",
    "captured",
    "profile_steps",
    "peak_tflops",
)
ENGINES = ("plain", "deepspeed", "replicated")
PRECISIONS = ("fp32", "bf16")
OFFLOADS = ("none", "optimizer", "all")
CAPTURED = ("auto", "on", "off")


@dataclass
class TrainerConfig:
    """How the loop runs.

    Attributes:
        engine: "plain" (one process); or, with one process or many (started by torchrun or `dspark launch`),
            "deepspeed", which spreads what is trained over them, or "replicated", where each holds the whole of it.
        zero_stage: what DeepSpeed spreads over the processes: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights
            too.
        offload: what DeepSpeed keeps in the CPU's memory: "none", "optimizer" or "all" (weights too, stage 3).
        captured: passes replayed as CUDA graphs, but not by DeepSpeed: "auto" where there is a CUDA device and what is
            trained has batches of few shapes, "on" everywhere (uncaptured on a CPU), or "off".
        steps: optimizer steps of the whole run (0 = whoever calls the loop decides, from its time budget).
        accumulation: micro-batches a step, of all processes together; gradients are averaged over all their tokens.
        clip_norm: largest gradient norm; longer gradients are scaled down to it (0 = no clipping).
        precision: "fp32", "bf16" (autocast over fp32 master weights) or "auto" (whoever calls the loop decides by
            device).
        schedule: "constant", "linear", "cosine" or "wsd" (warm-up, stable, decay).
        warmup_share: share of the steps in which the rate rises to its base value.
        final_factor: share of the base rate a falling schedule ends with.
        decay_share: share of the steps over which "wsd" falls.
        seed: seeds torch at the first step; a resumed run goes on with the saved random state.
        log_every_steps: steps averaged into one line of history and of the tracker.
        evaluate_every_steps: steps between evaluations (0 = only after the last step).
        checkpoint_every_steps: steps between checkpoints (0 = only after the last step).
        keep_checkpoints: newest checkpoints kept.
        best_metric: evaluation metric by which the best checkpoint is kept besides ("" = none).
        best_is: "max" or "min": which value of that metric is best.
        profile_steps: steps, after three of them, that torch's profiler watches (0 = none).
        peak_tflops: what one device can do at most in the arithmetic of training, in 10^12 operations a second, for the
            share of it that training reaches (0 = by the device's name; on a CPU no share is said).
    """

    engine: str = "plain"
    zero_stage: int = 2
    offload: str = "none"
    captured: str = "auto"
    steps: int = 0
    accumulation: int = 1
    clip_norm: float = 1.0
    precision: str = "auto"
    schedule: str = "cosine"
    warmup_share: float = 0.04
    final_factor: float = 0.0
    decay_share: float = 0.2
    seed: int = 0
    log_every_steps: int = 10
    evaluate_every_steps: int = 0
    checkpoint_every_steps: int = 100
    keep_checkpoints: int = 2
    best_metric: str = ""
    best_is: str = "max"
    profile_steps: int = 0
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "accumulation", "log_every_steps", "keep_checkpoints")
        _at_least(self, 0, "steps", "clip_norm", "evaluate_every_steps", "checkpoint_every_steps", "seed")
        _at_least(self, 0, "profile_steps", "peak_tflops")
        _one_of(self, "engine", ENGINES)
        _one_of(self, "offload", OFFLOADS)
        _one_of(self, "captured", CAPTURED)
        if self.zero_stage not in range(4):
            raise ValueError(f"trainer.zero_stage is {self.zero_stage}: choose 0, 1, 2 or 3")
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"trainer.offload={self.offload} needs zero_stage={needed} or more, got {self.zero_stage}")
        if self.offload != "none" and self.engine == "replicated":
            raise ValueError(f"trainer.offload={self.offload} is DeepSpeed's: use trainer=deepspeed, or offload=none")
        _one_of(self, "precision", (*PRECISIONS, "auto"))
        _one_of(self, "schedule", SCHEDULES)
        _one_of(self, "best_is", ("max", "min"))
        for name in ("warmup_share", "final_factor", "decay_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}: choose a share between 0 and 1")

    def captures(self, device_type: str) -> bool:
        """Whether passes are to be captured on a device, where batches allow it."""
        wanted = self.captured == "on" or (self.captured == "auto" and device_type == "cuda")
        return wanted and self.engine != "deepspeed"

    def trajectory(self) -> dict[str, Any]:
        """Return the settings a resumed run must share with the one it goes on from."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


def _at_least(cfg: TrainerConfig, least: int, *names: str) -> None:
    for name in names:
        if not getattr(cfg, name) >= least:
            raise ValueError(f"trainer.{name} is {getattr(cfg, name)}: choose {least} or more")


def _one_of(cfg: TrainerConfig, name: str, choices: tuple[str, ...]) -> None:
    if getattr(cfg, name) not in choices:
        raise ValueError(f"trainer.{name} is {getattr(cfg, name)!r}: choose one of {', '.join(choices)}")
