"""A target that drifts for real: LoRA fine-tuning on one domain, and what that does to a draft made for it before.

    python -m pipelines.drift_target --out drift --checkpoints 25,50,100,200

The domain is maths: GSM8K questions with the data set's own terse answers, rendered by the target's chat template, loss
on the answer only. At every checkpoint the adapters are merged into a copy that is saved as an ordinary model folder
`step-N`, and tau of the unchanged draft is measured on it, on the domain and on two others. Nothing is re-aligned here:
the folders are what re-alignment is tried on. Rows that drafts are scored on are never read.
"""

import argparse
import copy
import logging
import math
import os
import random
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from distill.drafts import save_model
from inference.errors import InputError
from inference.loading import load_causal_model
from inference.model import CausalModel
from inference.pair_files import DEFAULT_CACHE, DRAFT_FILE
from inference.precision import available_precisions
from inference.target import TargetConfig
from pipelines.drifting_data import Example, make_batch, read_examples, read_probe_prompts, split_examples
from pipelines.files import fsync_path, fsync_tree, writing
from pipelines.staleness import DraftProbe, Point, Settings
from pipelines.staleness_report import REPORT, staleness_markdown, write_report
from train.batches import Batch
from train.config import TrainerConfig
from train.errors import TrainingError
from train.loop import fit
from train.optimizers.adamw import Config as AdamW
from train.results import LossOutput
from train.trackers import NoTracker

logger = logging.getLogger(__name__)

SEED_DRAFT = Path(__file__).parents[1] / "distill" / "seeds" / "smollm2-135m" / "draft"
_WORK = ".training"


def answer_loss(model: CausalModel, batch: Batch) -> LossOutput:
    """Cross-entropy of the answers, in nats, summed over their tokens. Only these go through the output head."""
    learned = batch["labels"] >= 0
    states = model.states(batch["tokens"], mask=batch["attention"])[learned]
    logits = model.head(states).float()
    total = functional.cross_entropy(logits, batch["labels"][learned], reduction="sum")
    return LossOutput(loss_sum=total, weight_sum=int(learned.sum()))


def _training_precision(device: torch.device) -> str:
    """bf16 where a GPU or a CPU's instructions multiply it."""
    return "bf16" if device.type == "cuda" or "bf16_packed" in available_precisions(device) else "fp32"


class _Losses(NoTracker):
    """A tracker that remembers the step reached and the mean loss before it."""

    def __init__(self) -> None:
        self.step, self.loss = 0, math.nan

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Keep what came last; evaluations have no loss."""
        self.step, self.loss = step, metrics.get("loss", self.loss)


@contextmanager
def _newer_transformers() -> Iterator[None]:
    """Keep a notice to peft's authors off the user's terminal: peft 0.21 asks transformers 5.23 by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def drift(target: Path, draft: Path, out: Path, *, settings: Settings, device: torch.device) -> list[Point]:
    """Fine-tune the target and measure the draft along the way.

    Args:
        target: folder of the unchanged target.
        draft: folder of the draft.
        out: gets `step-N` folders and the report; the report is written anew after every checkpoint.
        settings: how.
        device: where training and decoding run.

    Returns:
        The unchanged target, then every checkpoint.

    Raises:
        InputError: a folder is not what it should be, `out` holds results already, or it cannot be written.
        TrainingError: a loss became NaN or infinite.
    """
    if any(out.glob("step-*")) or (out / f"{REPORT}.json").exists():
        raise InputError("results of another run are here", where=str(out), mend="choose another --out or remove them")
    with writing(out):
        shutil.rmtree(out / _WORK, ignore_errors=True)
        (out / _WORK).mkdir(parents=True)
    model = load_causal_model(target, precision="fp32", device=device)
    longest = min(settings.max_tokens, model.context_limit)
    training, probed = split_examples(read_examples(model.tokenizer, max_tokens=longest))
    logger.info("training on %d conversations, probing the loss on %d", len(training), len(probed))
    prompts = read_probe_prompts(model.tokenizer, count=settings.tau_prompts, seed=settings.seed)
    probe = DraftProbe(draft, prompts, settings, device)
    adapted = _with_adapters(model, settings)
    points: list[Point] = []

    def note(point: Point) -> None:
        points.append(point)
        for tau in point.taus:
            logger.info("step %d %s T=%g tau %s", point.step, tau.domain, tau.temperature, tau.tau)
        write_report(points, out, settings=settings, base=target, draft=draft)

    note(probe.measure(target, step=0))
    losses = _Losses()

    def evaluate() -> dict[str, float]:
        """Save and measure, if this step is a checkpoint."""
        loss = _mean_loss(model, probed[: 4 * settings.batch], settings.batch)
        if losses.step in settings.checkpoints:
            # What is merged and decoded is not to be rounded as the products of training are.
            with torch.autocast(device.type, enabled=False):
                folder = out / f"step-{losses.step}"
                _save_merged(adapted, target, folder)
                note(probe.measure(folder, step=losses.step, losses=(losses.loss, loss)))
        return {"loss": loss}

    every = math.gcd(settings.steps, *settings.checkpoints)
    trainer = TrainerConfig(
        steps=settings.steps,
        precision=_training_precision(device),
        seed=settings.seed,
        log_every_steps=every,
        evaluate_every_steps=every,
        checkpoint_every_steps=0,
    )
    try:
        fit(
            model.model,
            batches=lambda step, micro: make_batch(_drawn(training, step, settings), device=device),
            loss=lambda batch: answer_loss(model, batch),
            optimizer=AdamW(lr=settings.lr),
            cfg=trainer,
            folder=out / _WORK,
            tracker=losses,
            evaluate=evaluate,
        )
    finally:
        shutil.rmtree(out / _WORK, ignore_errors=True)
    return points


def _drawn(examples: list[Example], step: int, settings: Settings) -> list[Example]:
    """The conversations of a step: every one once an epoch, in an order of the epoch's own."""
    drawn = []
    for index in range(step * settings.batch, (step + 1) * settings.batch):
        epoch, place = divmod(index, len(examples))
        order = list(range(len(examples)))
        random.Random(f"{settings.seed}/{epoch}").shuffle(order)
        drawn.append(examples[order[place]])
    return drawn


def _mean_loss(model: CausalModel, examples: Sequence[Example], batch: int) -> float:
    """Mean loss of answers, in nats a token."""
    pieces = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    outputs = [answer_loss(model, make_batch(piece, device=model.device)) for piece in pieces]
    return math.fsum(float(o.loss_sum) for o in outputs) / math.fsum(float(o.weight_sum) for o in outputs)


def _with_adapters(model: CausalModel, settings: Settings) -> Any:
    """Put trainable adapters on the linear layers, in place, and freeze the rest; returns peft's view of the model."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear"
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with _newer_transformers(), torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)
        return get_peft_model(model.model, config)


def _save_merged(adapted: Any, base: Path, folder: Path) -> None:
    """Merge the adapters into a copy of the model and save that, whole or not at all; training goes on unmerged."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    with _newer_transformers():
        merged = copy.deepcopy(adapted).merge_and_unload()
    with writing(folder):
        try:
            save_model(CausalModel(merged, folder=base), aside, tokenizer_from=base)
            (aside / DRAFT_FILE).unlink()  # it is a target
            fsync_tree(aside)
            os.rename(aside, folder)
            fsync_path(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(int(word) for word in text.split(","))


def main(argv: list[str] | None = None) -> int:
    """Command line: exit code 0 with the tables on standard output, 2 with one line for bad input."""
    usual = Settings()
    parser = argparse.ArgumentParser(prog="python -m pipelines.drift_target", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, new or empty")
    parser.add_argument("--target", default=TargetConfig().path, help="embedded, a model folder or an id")
    parser.add_argument("--draft", type=Path, default=SEED_DRAFT, help="folder of a draft made for the target")
    parser.add_argument("--steps", type=int, default=usual.steps, help="optimizer steps")
    parser.add_argument("--checkpoints", type=_numbers, default=None, help="steps to save and measure at: 25,50,100")
    parser.add_argument("--rank", type=int, default=usual.rank, help="of the adapters")
    parser.add_argument("--lr", type=float, default=usual.lr, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=usual.batch, help="conversations a step")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of everything random")
    parser.add_argument("--max-tokens", type=int, default=usual.max_tokens, help="longest conversation")
    parser.add_argument("--tau-prompts", type=int, default=usual.tau_prompts, help="prompts of the domain for tau")
    parser.add_argument("--answer-tokens", type=int, default=usual.answer_tokens, help="longest answer for tau")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    words = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        given = {name: value for name, value in vars(words).items() if name in Settings.__dataclass_fields__}
        if words.checkpoints is None:
            given["checkpoints"] = tuple(sorted({min(step, words.steps) for step in (*usual.checkpoints, words.steps)}))
        config = TargetConfig(path=words.target, device=words.device)
        points = drift(
            config.folder(words.cache.expanduser()),
            words.draft,
            words.out,
            settings=Settings(**given),
            device=config.torch_device(),
        )
    except (InputError, TrainingError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(staleness_markdown(points))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
