"""The training loop: gradients, steps, checkpoints, evaluation. It is given batches and a loss and knows no more.

    result = fit(module, batches=batches, loss=loss, optimizer=AdamW(lr=1e-3), cfg=TrainerConfig(steps=200),
                 folder=work, tracker=NoTracker(), evaluate=None)

Batches are a pure function of (step, micro-batch), so the position in the data is just the step. A run that was
killed is called again with the same arguments and goes on from its newest whole checkpoint; in fp32 on the CPU it
ends with the same bytes as a run that was never interrupted.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from train.ahead import BatchesAhead
from train.batches import Batch
from train.config import TrainerConfig
from train.engines import Engine, Loss, Weigh
from train.engines.captured import CapturedEngine
from train.engines.plain import PlainEngine
from train.engines.replicated import ReplicatedCapturedEngine, ReplicatedEngine
from train.optimizers import OptimizerConfig
from train.profiling import PROFILE_FILE, StepProfile
from train.progress import Progress
from train.results import FitResult, LossOutput
from train.run import Run
from train.signals import StopRequest, raise_for
from train.trackers import Tracker, guarded


def fit(
    module: nn.Module,
    *,
    batches: Callable[[int, int], Batch],
    loss: Loss,
    optimizer: OptimizerConfig,
    cfg: TrainerConfig,
    folder: Path,
    tracker: Tracker,
    evaluate: Callable[[], dict[str, float]] | None = None,
    weigh: Weigh | None = None,
    used_apart: Sequence[nn.Module] = (),
    ahead: bool = False,
    fixed_shapes: bool = False,
) -> FitResult:
    """Train the parameters of a module that require a gradient, in place.

    The gradient of a step is grad(sum of `loss_sum`) / (sum of `weight_sum`) over its micro-batches: the true mean.
    With `engine: deepspeed` or `replicated` the processes of torch.distributed call this together, each with the same
    arguments; the micro-batches are dealt to them, and the first one keeps history, tracker and checkpoints.

    Args:
        module: what is trained; it is put in training mode. Trainable half-precision parameters become fp32.
        batches: (step, micro-batch), both counted from 0, to a batch; a pure function.
        loss: batch to sums; runs under the configured arithmetic.
        optimizer: configuration that builds the optimizer.
        cfg: settings of the loop, `precision` resolved.
        folder: checkpoints go to `<folder>/checkpoints`; the same place for all processes.
        tracker: gets the history as it grows; closed at the end. Its failures are warned about once.
        evaluate: returns metrics; runs in eval mode without gradients, and random numbers it draws do not reach
            training.
        weigh: the `weight_sum` of a batch's loss without running the model; DeepSpeed needs it.
        used_apart: parts of the module whose parameters are read outside their own `forward`, for ZeRO stage 3.
        ahead: make each batch in a thread while the step before runs; only for batches that read nothing trained.
        fixed_shapes: batches come in few shapes and nothing in `loss` waits for the device, so that it can be captured
            (see `train.engines.captured`).

    Returns:
        Counters, metrics and where the checkpoints are.

    Raises:
        TrainingDiverged: a loss or gradient is NaN or infinite; checkpoints, and weights but for DeepSpeed's, are those
            before the step.
        TrainingError: nothing to train, no weight in a batch, settings other than the checkpoint's, `best_metric` not
            among the evaluation's metrics, or an engine that cannot do what is asked.
        KeyboardInterrupt, Stopped: SIGINT or SIGTERM came; a checkpoint was written after the step in progress.
    """
    tracker = guarded(tracker)
    try:
        make = partial(
            _engine,
            module,
            loss=loss,
            weigh=weigh,
            optimizer=optimizer,
            cfg=cfg,
            used_apart=used_apart,
            fixed_shapes=fixed_shapes,
        )
        thread = BatchesAhead(batches, steps=cfg.steps, accumulation=cfg.accumulation) if ahead else None
        batches = thread or batches
        run = Run(module, batches, make, optimizer, cfg, folder / "checkpoints", tracker, evaluate)
        if thread is not None:
            thread.deal(run.engine.rank, run.engine.size)
        alone = run.engine.size == 1
        watched = StepProfile(cfg.profile_steps, folder / PROFILE_FILE if run.leads else None)
        shown = Progress(cfg.steps, done=run.step, shown=run.leads)
        making = thread or nullcontext()
        with making, StopRequest(alone=alone) as stop, watched as profiled, shown as progress:
            while run.step < cfg.steps:
                profiled.step()
                run.make_step(stop)
                progress.advance(run.step, loss=run.last_loss, lr=run.last_lr)
                run.after_step()
                if (told := stop.signal if alone else run.told) is not None:
                    run.save()
                    raise_for(told, step=run.step)
        run.engine.finish()
    finally:
        tracker.finish()
    return run.result()


def _engine(
    module: nn.Module,
    *,
    loss: Loss,
    weigh: Weigh | None,
    optimizer: OptimizerConfig,
    cfg: TrainerConfig,
    used_apart: Sequence[nn.Module],
    fixed_shapes: bool,
) -> Engine:
    given: dict[str, Any] = {
        "loss": loss,
        "optimizer": optimizer,
        "arithmetic": cfg.precision,
        "clip_norm": cfg.clip_norm,
    }
    captured = fixed_shapes and cfg.captures(next(module.parameters()).device.type)
    if cfg.engine == "plain":
        return (CapturedEngine if captured else PlainEngine)(module, **given)
    if cfg.engine == "replicated":
        kind = ReplicatedCapturedEngine if captured else ReplicatedEngine
        return kind(module, accumulation=cfg.accumulation, **given)
    from train.engines.zero import ZeroEngine

    assert weigh is not None, "DeepSpeed scales by the weight of a whole step before its backward passes"
    return ZeroEngine(
        module,
        **given,
        weigh=weigh,
        accumulation=cfg.accumulation,
        stage=cfg.zero_stage,
        offload=cfg.offload,
        used_apart=used_apart,
    )


__all__ = ["Batch", "FitResult", "LossOutput", "TrainerConfig", "fit"]
