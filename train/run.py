"""One run of the loop: what it holds between steps, how a step is made, what follows it. `train.loop` drives it."""

import logging
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train import checkpoint, precision
from train.batches import Batch, batch_digest
from train.config import TrainerConfig
from train.engines import Engine
from train.errors import TrainingDiverged, TrainingError
from train.optimizers import OptimizerConfig
from train.peaks import device_peak_flops
from train.results import FitResult, LossOutput, Number
from train.resuming import check_same_settings, plain_settings
from train.schedule import factor
from train.signals import StopRequest
from train.throughput import FlopCount, Speed, Usage
from train.trackers import Tracker
from train.trackers.none import NoTracker

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TIMED_STEPS = 1000
_RANK_SEED = 7919  # processes draw their own dropout; the first one draws what one process does


@dataclass(frozen=True)
class _Sums:
    """Sums of one step over all processes: per micro-batch, then over all of them."""

    losses: list[float]
    weights: list[float]
    tokens: int
    supervised: int
    fed: int
    flops: float
    metrics: dict[str, tuple[float, float]]


class Run:
    """State of one run between steps; everything in `_record` survives a kill."""

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[int, int], Batch],
        engine: Callable[[], Engine],
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
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise TrainingError("no parameter requires a gradient", mend="unfreeze what is to be trained")
        self.module, self.batches, self.evaluate = module, batches, evaluate
        self.cfg, self.root = cfg, root
        self.device = named[0][1].device
        self.settings = {"trainer": cfg.trajectory(), "optimizer": plain_settings(optimizer)}
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.supervised, self.fed = 0, 0
        self.history: list[dict[str, float]] = []
        self.metrics: dict[str, float] = {}
        self.window: dict[str, list[float]] = {}
        self.best: tuple[int, float] | None = None
        self.last_loss, self.last_lr = math.nan, math.nan
        self.told: int | None = None  # the signal that one of the processes has got
        snapshot = self._snapshot()
        self.engine = engine()
        self.leads = self.engine.rank == 0
        self.base_lrs = [float(group["lr"]) for group in self.engine.optimizer.param_groups]
        self.resumed_step = self._resume(snapshot)
        self.saved_step = self.resumed_step
        self.step_seconds: deque[float] = deque(maxlen=_TIMED_STEPS)
        self.flops = 0.0  # of one step over all processes, counted in the first one of this call
        known = 1e12 * cfg.peak_tflops or device_peak_flops(self.device, cfg.precision)
        self.peak = known * self.engine.size if known else None
        self.usage = Usage(self.device, self.peak)
        self.tracker: Tracker = tracker if self.leads else NoTracker()
        self.clock = time.monotonic()
        module.train()

    # One step

    def make_step(self, stop: StopRequest) -> None:
        """Accumulate, check, clip, and move the parameters once; hear whether any process was told to stop."""
        began, first = time.monotonic(), self.step == self.resumed_step
        self.last_lr = self._set_rate()
        own, count = self._own(), FlopCount() if first else None
        with count or nullcontext():
            outputs = self.engine.accumulate(self.batches(self.step, micro) for micro in own)
        sums = self._sums(outputs, own, stop, flops=count.flops if count else 0.0)
        self._check_losses(sums.losses, sums.weights)
        norm = self.engine.move(math.fsum(sums.weights))
        if not math.isfinite(norm):
            self._diverged(f"gradient norm is {norm}", range(self.cfg.accumulation))
        self.step += 1
        self.last_loss = math.fsum(sums.losses) / math.fsum(sums.weights)
        self.flops = sums.flops if first else self.flops
        self._account(sums, norm)
        self._time(time.monotonic() - began, sums)

    def _time(self, seconds: float, sums: "_Sums") -> None:
        """Note what a step took; that of the first one counts only until there is another."""
        if len(self.step_seconds) == 1 and self.step == self.resumed_step + 2:
            self.step_seconds.clear()
        self.step_seconds.append(seconds)
        self.usage.step(tokens=sums.supervised, fed=sums.fed, seconds=seconds)

    def _own(self) -> range:
        """This process's micro-batches of a step."""
        return range(self.engine.rank, self.cfg.accumulation, self.engine.size)

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
        for group, base in zip(self.engine.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * scale
        return self.base_lrs[0] * scale

    def _sums(self, outputs: list[LossOutput], own: range, stop: StopRequest, *, flops: float) -> "_Sums":
        """The step's sums over all processes, in one exchange."""
        count = self.cfg.accumulation
        names = sorted(outputs[0].sums)
        found = _on_host([output.numbers() for output in outputs])
        values = torch.zeros(5, count, dtype=torch.float64)
        values[:, own] = found[:, :5].T
        values[2:4] = values[2:4].round()
        pairs = [math.fsum(column) for column in found[:, 5:].T.tolist()]
        asked = [float(stop.signal == number) for number in _SIGNALS]
        flat = torch.cat([values.flatten(), torch.tensor([*pairs, flops, *asked], dtype=torch.float64)])
        whole = self.engine.total(flat).tolist()
        self.told = next((number for number, asked in zip(_SIGNALS, whole[-2:], strict=True) if asked), None)
        return _Sums(
            losses=whole[:count],
            weights=whole[count : 2 * count],
            tokens=round(math.fsum(whole[2 * count : 3 * count])),
            supervised=round(math.fsum(whole[3 * count : 4 * count])),
            fed=round(math.fsum(whole[4 * count : 5 * count])),
            flops=whole[-3],
            metrics={name: (whole[5 * count + 2 * i], whole[5 * count + 2 * i + 1]) for i, name in enumerate(names)},
        )

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

    def _diverged(self, what: str, micros: Sequence[int]) -> None:
        digests = [batch_digest(self.batches(self.step, micro)) for micro in micros]
        last = checkpoint.step_folder(self.root, self.saved_step) if self.saved_step else None
        raise TrainingDiverged(what, step=self.step + 1, digests=digests, checkpoint=last)

    def _account(self, sums: "_Sums", norm: float) -> None:
        """Add a step to the window of sums that the next line of history divides."""
        self._add("loss", math.fsum(sums.losses), math.fsum(sums.weights))
        self._add("grad_norm", norm, 1.0)
        self.tokens += sums.tokens
        self.supervised += sums.supervised
        self.fed += sums.fed
        for name, (value, total) in sums.metrics.items():
            self._add(name, value, total)

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
        self.history.append({"step": self.step, "supervised": self.supervised, **metrics})
        used = {"tokens": float(self.tokens), "seconds": self._elapsed(), **self.usage.taken(self.flops)}
        self.tracker.log(self.step, {**metrics, **used})

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Eval mode, no gradients, and random numbers that do not reach training."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), _eval_mode(self.module):
            yield

    def _evaluate(self) -> bool:
        """Measure; return whether this is the best value of `best_metric` so far."""
        if self.evaluate is None:
            return False
        with self._aside():
            found = self.engine.within(self.evaluate)
        metrics = {f"eval/{name}": float(value) for name, value in found.items()}
        self.metrics.update(metrics)
        self.history.append({"step": self.step, "supervised": self.supervised, **metrics})
        self.tracker.log(self.step, metrics)
        if self.leads:
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
            "supervised": self.supervised,
            "fed": self.fed,
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
            weights=self.engine.weights(),
            optimizer=self.engine.optimizer_state(),
            rng=self.engine.rng(),
            record=self._record(),
        )
        failed = None
        if self.leads:
            try:
                self._write(snapshot)
            except OSError as error:
                failed = error
        self.engine.agree(failed)
        self.saved_step = self.step

    def _write(self, snapshot: checkpoint.Snapshot) -> None:
        checkpoint.write_snapshot(self.root, snapshot)
        best_step = self.best[0] if self.best else None
        checkpoint.rotate(self.root, step=self.step, keep=self.cfg.keep_checkpoints, best_step=best_step)

    def _snapshot(self) -> checkpoint.Snapshot | None:
        """The newest whole checkpoint, its weights put into the module."""
        snapshot = checkpoint.newest_snapshot(self.root)
        if snapshot is not None:
            where = checkpoint.step_folder(self.root, snapshot.step)
            check_same_settings(snapshot.record["settings"], self.settings, where=where)
            checkpoint.put_weights(self.module, snapshot.weights, where=where)
        return snapshot

    def _resume(self, snapshot: checkpoint.Snapshot | None) -> int:
        """Go on from a checkpoint, or seed torch for a fresh start; return the step reached before."""
        step = snapshot.step if snapshot else 0
        steps = self.engine.total(torch.tensor([float(step)], dtype=torch.float64)).item()
        if steps != step * self.engine.size:
            raise TrainingError(
                f"the processes do not see the same checkpoints, one that of step {step}",
                where=str(self.root),
                mend="put the artifacts on a disk that all nodes share",
            )
        torch.manual_seed(self.cfg.seed + _RANK_SEED * self.engine.rank)
        if snapshot is None:
            return 0
        record = snapshot.record
        self.engine.load(snapshot.weights, snapshot.optimizer)
        if not self.engine.load_rng(snapshot.rng) and self.leads:
            _LOG.info("another number of processes saved the checkpoint: dropout, if any, is drawn anew")
        self.step, self.tokens, self.seconds = snapshot.step, record["tokens"], record["seconds"]
        # Checkpoints of earlier versions do not count them.
        self.supervised, self.fed = record.get("supervised", self.tokens), record.get("fed", 0)
        self.metrics, self.history, self.window = record["metrics"], record["history"], record["window"]
        self.best = (int(record["best"][0]), record["best"][1]) if record["best"] else None
        self.last_loss, self.last_lr = record["last_loss"], record["last_lr"]
        if self.leads:
            where = checkpoint.step_folder(self.root, snapshot.step)
            _LOG.info("resumed from step %d of %d: %s", snapshot.step, self.cfg.steps, where)
        return snapshot.step

    def result(self) -> FitResult:
        """Return the account of the run."""
        seconds = statistics.median(self.step_seconds) if self.step_seconds else 0.0
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
            step_seconds=seconds,
            speed=self._speed(seconds) if seconds else None,
        )

    def _speed(self, seconds: float) -> Speed:
        """What steps of some seconds come to, at the mean tokens of all steps."""
        rate = 1.0 / seconds
        return Speed(
            steps_per_s=rate,
            tokens_per_s=rate * self.supervised / self.step,
            fed_tokens_per_s=rate * self.fed / self.step if self.fed else None,
            step_tflops=self.flops / 1e12 if self.flops else None,
            peak_tflops=self.peak / 1e12 if self.peak else None,
        )


def _on_host(rows: list[list[Number]]) -> torch.Tensor:
    """Numbers `[n, k]`, fp64, wherever they lie: what lies on a device comes in one copy, the one wait for it."""
    flat = [number for row in rows for number in row]
    there = [number.detach() for number in flat if isinstance(number, torch.Tensor)]
    come = iter(torch.stack([number.double().to(there[0].device) for number in there]).tolist() if there else [])
    known = [next(come) if isinstance(number, torch.Tensor) else float(number) for number in flat]
    return torch.tensor(known, dtype=torch.float64).reshape(len(rows), -1)


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


__all__ = ["Run"]
