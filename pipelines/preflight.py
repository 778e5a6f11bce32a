"""What a training cannot do here, said before anything is made for it: minutes of corpus are not for nothing."""

import importlib.util
import logging

from inference.drafters.quantized import check_packed_step
from inference.errors import InputError
from inference.precision import has_bf16_products
from inference.processes import num_processes
from inference.target import PACKED_FORMATS
from pipelines.config import RunConfig
from train.engines.spreading import check_spread
from train.optimizers import adamw8bit

logger = logging.getLogger(__name__)


def check_training(cfg: RunConfig) -> None:
    """Refuse what the drafts that are trained ask for and this machine, or several processes, cannot do.

    Raises:
        InputError: that.
        TrainingError: steps or state that cannot be shared out.
    """
    trained = {name: draft for name, draft in cfg.draft.items() if draft.trained}
    if not trained:
        return
    device, size = cfg.target.torch_device(), num_processes()
    if cfg.trainer.engine == "deepspeed":
        _check_deepspeed(cfg, size)
    elif cfg.trainer.engine == "replicated":
        _check_replicated(cfg, size)
    elif size > 1:
        others = "trainer=replicated (drafts that fit each process) or trainer=deepspeed"
        logger.warning("trainer.engine is plain: the first process trains alone; %s uses all %d", others, size)
    if isinstance(cfg.optimizer, adamw8bit.Config):
        cfg.optimizer.check(device)
    formats = [cfg.target.teacher_precision] if cfg.target.teacher_precision in PACKED_FORMATS else []
    formats += ["nf4" for draft in trained.values() if getattr(draft, "adapter", "") == "qlora"]
    for weight_format in dict.fromkeys(formats):
        check_packed_step(weight_format, device)
    for name, draft in trained.items():
        if cfg.target.teacher_precision in PACKED_FORMATS and getattr(draft, "init", "") == "target":
            raise InputError(
                f"a draft cannot start from layers packed as {cfg.target.teacher_precision}",
                where=f"draft.{name}.init",
                mend=f"use draft.{name}.init=random, or target.teacher_precision=fp32",
            )
    if cfg.trainer.precision == "bf16" and device.type == "cpu" and not has_bf16_products():
        logger.warning("this CPU has no bf16 instructions: trainer.precision=bf16 will be slower than fp32")


def _check_replicated(cfg: RunConfig, size: int) -> None:
    check_spread(cfg.optimizer, accumulation=cfg.trainer.accumulation, size=size, stage=0)
    if cfg.target.spread_teacher and size > 1:
        _check_installed("target.spread_teacher")


def _check_installed(where: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("deepspeed is not installed", where=where, mend="pip install deepspeed")


def _check_deepspeed(cfg: RunConfig, size: int) -> None:
    _check_installed("trainer=deepspeed")
    trainer = cfg.trainer
    check_spread(cfg.optimizer, accumulation=trainer.accumulation, size=size, stage=trainer.zero_stage)
    if trainer.zero_stage < 3:
        return
    for name, draft in cfg.draft.items():
        if getattr(draft, "on_policy_share", 0.0) > 0.0:
            raise InputError(
                "a student whose weights are spread cannot write by itself: processes write for different lengths",
                where=f"draft.{name}.on_policy_share",
                mend="use trainer.zero_stage=2",
            )
        if getattr(draft, "adapter", "") == "qlora":
            raise InputError(
                "4-bit weights cannot be spread", where=f"draft.{name}.adapter", mend="use trainer.zero_stage=2"
            )
