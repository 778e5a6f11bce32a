"""What goes into a step and what comes out of a run: two plain records. No behaviour."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from train.throughput import Speed

Number = Tensor | float
Pair = tuple[Number, Number]


@dataclass
class LossOutput:
    """What a loss function returns for one micro-batch.

    Attributes:
        loss_sum: sum of the weighted losses, a scalar with a graph.
        weight_sum: sum of the weights; gradients are divided by its total over the step.
        sums: metrics as (sum, total) pairs; they are added up and divided once.
        tokens: tokens learned from, for the accounts (a plain 0 = weight_sum is that number).
        supervised: positions learned from, whatever they weigh, for the speed (a plain 0 = `tokens`).
        fed: tokens that the model reads, without padding, for the speed (0 = not told).
    """

    loss_sum: Tensor
    weight_sum: Number
    sums: dict[str, Pair] = field(default_factory=dict)
    tokens: Number = 0
    supervised: Number = 0
    fed: Number = 0

    def numbers(self) -> list[Number]:
        """Loss, weight, tokens, supervised and fed, then value and total of each metric in order of their names."""
        tokens = self.tokens if isinstance(self.tokens, Tensor) or self.tokens else self.weight_sum
        supervised = self.supervised if isinstance(self.supervised, Tensor) or self.supervised else tokens
        pairs = [number for name in sorted(self.sums) for number in self.sums[name]]
        return [self.loss_sum, self.weight_sum, tokens, supervised, self.fed, *pairs]


@dataclass
class FitResult:
    """What a run ended with.

    Attributes:
        steps: steps made in all, earlier interrupted runs included.
        tokens: tokens learned from in all.
        seconds: wall-clock seconds spent training and evaluating in all, as far as checkpoints recorded them.
        metrics: metrics of the last logged steps and of the last evaluation, the latter as "eval/<name>".
        history: one dict a logged step ("step", "supervised" positions so far, "loss", "lr", "grad_norm", the loss's
            own sums) or evaluation ("step", "supervised", its metrics).
        checkpoint: the last checkpoint.
        best_step: step of the best checkpoint by `best_metric`, None without one.
        best_value: its value.
        resumed_step: the step this call went on from (0 = it started afresh).
        step_seconds: median seconds of a step of this call, without logging, evaluation and checkpoints, and where
            there are more without the first one, in which memory is laid out and operations are counted.
        speed: what that comes to a second; None where this call made no step.
    """

    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    history: list[dict[str, float]]
    checkpoint: Path
    best_step: int | None
    best_value: float | None
    resumed_step: int
    step_seconds: float
    speed: Speed | None
