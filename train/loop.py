"""The training loop: gradients, steps, checkpoints, evaluation. It is given batches and a loss and knows no more.

    result = fit(module, batches=batches, loss=loss, optimizer=AdamW(lr=1e-3), cfg=TrainerConfig(steps=200),
                 folder=work, tracker=NoTracker(), evaluate=None)

Batches are a pure function of (step, micro-batch), so the position in the data is just the step. A run that was
killed is called again with the same arguments and goes on from its newest whole checkpoint; in fp32 on the CPU it
ends with the same bytes as a run that was never interrupted.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from train import checkpoint, precision
from train.batches import Batch, batch_digest
from train.config import TrainerConfig
from train.errors import TrainingDiverged, TrainingError
from train.optimizers import OptimizerConfig
from train.progress import Progress
from train.results import FitResult, LossOutput
from train.schedule import factor
from train.signals import StopRequest
from train.trackers import Tracker, guarded

_LOG = logging.getLogger(__name__)


def fit(
    module: nn.Module,
    *,
    batches: Callable[[int, int], Batch],
    loss: Callable[[Batch], LossOutput],
    optimizer: OptimizerConfig,
    cfg: TrainerConfig,
    folder: Path,
    tracker: Tracker,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> FitResult:
    """Train the parameters of a module that require a gradient, in place.

    The gradient of a step is grad(sum of `loss_sum`) / (sum of `weight_sum`) over its micro-batches: the true mean.

    Args:
        module: what is trained; it is put in training mode. Trainable half-precision parameters become fp32.
        batches: (step, micro-batch), both counted from 0, to a batch; a pure function.
        loss: batch to sums; runs under the configured arithmetic.
        optimizer: configuration that builds the optimizer.
        cfg: settings of the loop, `precision` resolved.
        folder: checkpoints go to `<folder>/checkpoints`.
        tracker: gets the history as it grows; closed at the end. Its failures are warned about once.
        evaluate: returns metrics; runs in eval mode without gradients, and random numbers it draws do not reach
            training.

    Returns:
        Counters, metrics and where the checkpoints are.

    Raises:
        TrainingDiverged: a loss or gradient is NaN or infinite; weights and checkpoints are those before the step.
        TrainingError: nothing to train, no weight in a batch, settings other than the checkpoint's, `best_metric` not
            among the evaluation's metrics.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; a checkpoint was written after the step in progress.
    """
    tracker = guarded(tracker)
    try:
        run = _Run(module, batches, loss, optimizer, cfg, folder / "checkpoints", tracker, evaluate)
        with StopRequest() as stop, Progress(cfg.steps, done=run.step) as progress:
            while run.step < cfg.steps:
                run.make_step()
                progress.advance(run.step, loss=run.last_loss, lr=run.last_lr)
                run.after_step()
                if stop.signal is not None:
                    run.save()
                    stop.raise_if_asked()
    finally:
        tracker.finish()
    return run.result()


class _Run:
    """State of one run between steps; everything in `_record` survives a kill."""

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[int, int], Batch],
        loss: Callable[[Batch], LossOutput],
        optimizer: OptimizerConfig,
        cfg: TrainerConfig,
        root: Path,
        tracker: Tracker,
        evaluate: Callable[[], dict[str, float]] | None,
    ) -> None:
        if cfg.precision == "auto":
            raise TrainingError("trainer.precision is still auto", mend="resolve it to fp32 or bf16 before training")
        if cfg.steps == 0:
            raise TrainingError("trainer.steps is 0", mend="say how many steps to train")
        if cfg.best_metric and evaluate is None:
            raise TrainingError(
                f"trainer.best_metric is {cfg.best_metric!r} but nothing is evaluated", mend='set it to ""'
            )
        precision.master_weights(module)
        self.named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not self.named:
            raise TrainingError("no parameter requires a gradient", mend="unfreeze what is to be trained")
        self.module, self.batches, self.loss, self.evaluate = module, batches, loss, evaluate
        self.cfg, self.root, self.tracker = cfg, root, tracker
        self.device = self.named[0][1].device
        self.optimizer: optim.Optimizer = optimizer.build(self.named)
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.settings = {"trainer": cfg.trajectory(), "optimizer": _plain(optimizer)}
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, float]] = []
        self.metrics: dict[str, float] = {}
        self.window: dict[str, list[float]] = {}
        self.best: tuple[int, float] | None = None
        self.last_loss, self.last_lr = math.nan, math.nan
        self.resumed_step = self._resume()
        self.saved_step = self.resumed_step
        self.clock = time.monotonic()
        module.train()

    # One step

    def make_step(self) -> None:
        """Accumulate, check, clip, and move the parameters once."""
        self.last_lr = self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        outputs = [self._backward(micro) for micro in range(self.cfg.accumulation)]
        losses = torch.stack([output.loss_sum for output in outputs]).double().tolist()  # the one wait for the device
        weights = [float(output.weight_sum) for output in outputs]
        self._check_losses(losses, weights)
        norm = self._scale_and_clip(sum(weights))
        if not math.isfinite(norm):
            self._diverged(f"gradient norm is {norm}", range(self.cfg.accumulation))
        self.optimizer.step()
        self.step += 1
        self.last_loss = math.fsum(losses) / math.fsum(weights)
        self._account(outputs, losses, weights, norm)

    def _set_rate(self) -> float:
        cfg = self.cfg
        scale = factor(
            self.step,
            schedule=cfg.schedule,
            steps=cfg.steps,
            warmup_share=cfg.warmup_share,
            final_factor=cfg.final_factor,
            decay_share=cfg.decay_share,
        )
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * scale
        return self.base_lrs[0] * scale

    def _backward(self, micro: int) -> LossOutput:
        batch = self.batches(self.step, micro)
        with precision.arithmetic(self.cfg.precision, device=self.device):
            output = self.loss(batch)
        output.loss_sum.backward()
        output.loss_sum = output.loss_sum.detach()
        return output

    def _check_losses(self, losses: list[float], weights: list[float]) -> None:
        for micro, value in enumerate(losses):
            if not math.isfinite(value):
                self._diverged(f"loss is {value} in micro-batch {micro}", [micro])
        if not math.fsum(weights) > 0.0:
            digests = ", ".join(batch_digest(self.batches(self.step, m)) for m in range(self.cfg.accumulation))
            raise TrainingError(
                f"the weights of a step sum to {math.fsum(weights):g}",
                where=f"step {self.step + 1}, batch digest {digests}",
                mend="give every batch at least one token to learn from",
            )

    def _scale_and_clip(self, weight: float) -> float:
        """Turn summed gradients into the mean's and clip them; return the norm before clipping."""
        grads = [p.grad for _, p in self.named if p.grad is not None]
        torch._foreach_div_(grads, weight)
        norm = torch.nn.utils.get_total_norm(grads)
        if self.cfg.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self.named], self.cfg.clip_norm, norm)
        return float(norm)

    def _diverged(self, what: str, micros: Sequence[int]) -> None:
        digests = [batch_digest(self.batches(self.step, micro)) for micro in micros]
        last = checkpoint.step_folder(self.root, self.saved_step) if self.saved_step else None
        raise TrainingDiverged(what, step=self.step + 1, digests=digests, checkpoint=last)

    def _account(self, outputs: list[LossOutput], losses: list[float], weights: list[float], norm: float) -> None:
        """Add a step to the window of sums that the next line of history divides."""
        self._add("loss", math.fsum(losses), math.fsum(weights))
        self._add("grad_norm", norm, 1.0)
        for output, weight in zip(outputs, weights, strict=True):
            self.tokens += output.tokens or round(weight)
            for name, (value, total) in output.sums.items():
                self._add(name, float(value), float(total))

    def _add(self, name: str, value: float, total: float) -> None:
        pair = self.window.setdefault(name, [0.0, 0.0])
        pair[0] += value
        pair[1] += total

    # Between steps

    def after_step(self) -> None:
        """Log, evaluate and save what is due."""
        cfg, last = self.cfg, self.step == self.cfg.steps
        if last or self.step % cfg.log_every_steps == 0:
            self._log({name: value / total for name, (value, total) in self.window.items() if total})
            self.window = {}
        improved = False
        if last or (cfg.evaluate_every_steps and self.step % cfg.evaluate_every_steps == 0):
            improved = self._evaluate()
        due = cfg.checkpoint_every_steps and self.step % cfg.checkpoint_every_steps == 0
        if last or due or improved:
            self.save()

    def _log(self, metrics: dict[str, float]) -> None:
        metrics["lr"] = self.last_lr
        self.metrics.update(metrics)
        self.history.append({"step": self.step, **metrics})
        self.tracker.log(self.step, {**metrics, "tokens": float(self.tokens), "seconds": self._elapsed()})

    def _evaluate(self) -> bool:
        """Measure; return whether this is the best value of `best_metric` so far."""
        if self.evaluate is None:
            return False
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), _eval_mode(self.module):
            with precision.arithmetic(self.cfg.precision, device=self.device):
                found = self.evaluate()
        metrics = {f"eval/{name}": float(value) for name, value in found.items()}
        self.metrics.update(metrics)
        self.history.append({"step": self.step, **metrics})
        self.tracker.log(self.step, metrics)
        _LOG.info("step %d %s", self.step, " ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return self._note_best(found)

    def _note_best(self, found: dict[str, float]) -> bool:
        name = self.cfg.best_metric
        if not name:
            return False
        if name not in found:
            raise TrainingError(
                f"trainer.best_metric is {name!r}, which the evaluation does not report",
                mend=f"choose one of {sorted(found)}",
            )
        sign = 1.0 if self.cfg.best_is == "max" else -1.0
        if math.isnan(found[name]) or (self.best and sign * found[name] <= sign * self.best[1]):
            return False
        self.best = (self.step, float(found[name]))
        return True

    # Checkpoints

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.clock

    def _record(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "tokens": self.tokens,
            "seconds": self._elapsed(),
            "metrics": self.metrics,
            "history": self.history,
            "window": self.window,
            "best": list(self.best) if self.best else None,
            "last_loss": self.last_loss,
            "last_lr": self.last_lr,
        }

    def save(self) -> None:
        """Write a checkpoint of the completed steps, unless there is one, and remove those not to be kept."""
        if self.saved_step == self.step:
            return
        snapshot = checkpoint.Snapshot(
            step=self.step,
            weights={name: p.detach() for name, p in self.named},
            optimizer=checkpoint.optimizer_state(self.module, self.optimizer),
            rng=checkpoint.rng_states(),
            record=self._record(),
        )
        checkpoint.write_snapshot(self.root, snapshot)
        self.saved_step = self.step
        best_step = self.best[0] if self.best else None
        checkpoint.rotate(self.root, step=self.step, keep=self.cfg.keep_checkpoints, best_step=best_step)

    def _resume(self) -> int:
        """Go on from the newest whole checkpoint, or seed torch for a fresh start; return the step reached before."""
        snapshot = checkpoint.newest_snapshot(self.root)
        if snapshot is None:
            torch.manual_seed(self.cfg.seed)
            return 0
        record = snapshot.record
        where = checkpoint.step_folder(self.root, snapshot.step)
        _same_settings(record["settings"], self.settings, where=where)
        checkpoint.put_weights(self.module, snapshot.weights, where=where)
        checkpoint.load_optimizer_state(self.module, self.optimizer, snapshot.optimizer)
        checkpoint.load_rng_states(snapshot.rng)
        self.step, self.tokens, self.seconds = snapshot.step, record["tokens"], record["seconds"]
        self.metrics, self.history, self.window = record["metrics"], record["history"], record["window"]
        self.best = (int(record["best"][0]), record["best"][1]) if record["best"] else None
        self.last_loss, self.last_lr = record["last_loss"], record["last_lr"]
        _LOG.info("resumed from step %d of %d: %s", snapshot.step, self.cfg.steps, where)
        return snapshot.step

    def result(self) -> FitResult:
        """Return the account of the run."""
        return FitResult(
            steps=self.step,
            tokens=self.tokens,
            seconds=self._elapsed(),
            metrics=self.metrics,
            history=self.history,
            checkpoint=checkpoint.step_folder(self.root, self.step),
            best_step=self.best[0] if self.best else None,
            best_value=self.best[1] if self.best else None,
            resumed_step=self.resumed_step,
        )


def _plain(optimizer: OptimizerConfig) -> dict[str, Any]:
    settings: dict[str, Any] = asdict(optimizer) if is_dataclass(optimizer) and not isinstance(optimizer, type) else {}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # as it will read when it comes back from a checkpoint
    return plain


def _same_settings(saved: dict[str, Any], given: dict[str, Any], *, where: Path) -> None:
    """Refuse to go on under other settings: the result would belong to neither."""
    for part, settings in given.items():
        for name in sorted(set(settings) | set(saved[part])):
            before, now = saved[part].get(name), settings.get(name)
            if before != now:
                raise TrainingError(
                    f"{part}.{name} was {before} and is now {now}",
                    where=str(where),
                    mend="give the earlier value to go on, or remove the checkpoints to start afresh",
                )


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode and give every part its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


__all__ = ["Batch", "FitResult", "LossOutput", "TrainerConfig", "fit"]
