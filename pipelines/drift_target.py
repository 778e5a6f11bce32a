"""A target that drifts for real: LoRA fine-tuning on one domain, and what that does to a draft made for it before.

    python -m pipelines.drift_target --out drift --checkpoints 25,50,100,200

The domain is maths: GSM8K questions with the data set's own terse answers, rendered by the target's chat template, loss
on the answer only. At every checkpoint the adapters are merged into a copy that is saved as an ordinary model folder
`step-N`, and tau of the unchanged draft is measured on it, on the domain and on two others. Nothing is re-aligned here:
the folders are what re-alignment is tried on. Rows that drafts are scored on are never read.
"""

import argparse
import copy
import json
import logging
import math
import os
import random
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from distill.chat import conversation_tokens, messages_for, render_prompt
from distill.drafts import save_model
from distill.prompts import Prompt, SourceContext, choose, package
from inference.block_length import decode_validation
from inference.drafters import LoadContext, load_drafter
from inference.errors import InputError, first_line
from inference.loading import load_causal_model
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.pair_files import DEFAULT_CACHE, DRAFT_FILE
from inference.parallel import load_target
from inference.precision import available_precisions
from inference.records import Record, record_of
from inference.sampling_settings import SamplingSettings
from inference.scoring import Arm, ScorePrompt
from inference.statistics import Bootstrap, Estimate, ratio
from inference.target import TargetConfig, stop_tokens, target_digest
from pipelines.files import content_digest, fsync_path, fsync_tree, replacing, write_json, write_text, writing
from pipelines.report import markdown_table
from train.batches import Batch
from train.config import TrainerConfig
from train.errors import TrainingError
from train.loop import fit
from train.optimizers.adamw import Config as AdamW
from train.results import LossOutput
from train.trackers import NoTracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SEED_DRAFT = Path(__file__).parents[1] / "distill" / "seeds" / "smollm2-135m" / "draft"
DATASET = "gsm8k_train"  # rows 0-999; the rows after them are held out and this set never gives them
PROBE_FROM_ROW = 900
"""Rows from here on are not trained on: tau is measured on them."""
DOMAIN = "maths"
OTHERS = {"code": "human_eval", "chat": "mt_bench"}
"""Domains that are not trained on, with the set their prompts come from; each gets a third of the domain's number."""
TEMPERATURES = (0.0, 1.0)
REPORT = "staleness"
_WORK = ".training"
_COLORS = {DOMAIN: "tab:red", "code": "tab:blue", "chat": "tab:green"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How far the target drifts, and how the draft is measured on it.

    Attributes:
        steps: optimizer steps.
        checkpoints: steps after which the target is saved and the draft measured.
        rank: of the adapters; their scale is twice the rank over the rank.
        lr: peak learning rate.
        batch: conversations a step.
        seed: of adapters, order, choice of prompts and sampling.
        max_tokens: longer conversations are left out.
        tau_prompts: prompts of the domain that tau is measured on; the other domains get a third of that each.
        answer_tokens: longest answer when tau is measured.
        block: tokens the draft proposes a round.
    """

    steps: int = 200
    checkpoints: tuple[int, ...] = (25, 50, 100, 200)
    rank: int = 16
    lr: float = 1e-3
    batch: int = 8
    seed: int = 0
    max_tokens: int = 512
    tau_prompts: int = 24
    answer_tokens: int = 96
    block: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "batch", "max_tokens", "tau_prompts", "answer_tokens", "block"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", where="drift", mend="use at least 1")
        if self.seed < 0 or not 0.0 < self.lr < math.inf:
            raise InputError(f"lr is {self.lr}, seed {self.seed}", where="drift", mend="use a rate > 0 and a seed >= 0")
        steps = list(self.checkpoints)
        if not steps or steps != sorted(set(steps)) or not 1 <= steps[0] <= steps[-1] <= self.steps:
            raise InputError(
                f"checkpoints are {steps}", where="drift", mend=f"use rising numbers between 1 and steps ({self.steps})"
            )


@dataclass(frozen=True)
class Example:
    """A conversation to learn from.

    Attributes:
        row: of the data set, from 0.
        tokens: the whole conversation.
        supervised: which of its tokens the target is to write: the answer and the token that ends it.
    """

    row: int
    tokens: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class Tau:
    """What the draft is worth on one domain at one temperature.

    Attributes:
        domain: of the prompts.
        temperature: they were decoded at.
        tau: emitted tokens per target pass.
        change: relative to the unchanged target on the same prompts, -0.2 for a fall by a fifth.
    """

    domain: str
    temperature: float
    tau: Estimate
    change: Estimate


@dataclass(frozen=True)
class Point:
    """The target after some steps.

    Attributes:
        step: optimizer steps made; 0 is the unchanged target.
        digest: of the target (`inference.target.target_digest`).
        train_loss: mean over the steps before this point, in nats a token; None at step 0.
        probe_loss: on reference answers that are not trained on, likewise; None at step 0.
        taus: by domain and temperature.
        answer: what the target answers to the first prompt of the domain at temperature 0.
    """

    step: int
    digest: str
    train_loss: float | None
    probe_loss: float | None
    taus: list[Tau]
    answer: str

    def tau(self, domain: str, temperature: float) -> Tau:
        """One of the measurements."""
        return next(t for t in self.taus if (t.domain, t.temperature) == (domain, temperature))


def read_examples(tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int) -> list[Example]:
    """Rows 0-999 of GSM8K as conversations of the target, those of more than `max_tokens` left out.

    Raises:
        InputError: the package is missing or damaged, or the tokenizer has no chat template.
    """
    questions = package.Config(dataset=DATASET).read(SourceContext(tokenizer, 0))
    file = package.QUESTION_FILES[DATASET]
    [path] = [Path(str(f.locate())) for f in metadata.files(file.package) or [] if f.as_posix() == file.path]
    lines = path.read_text(encoding="utf-8").splitlines()
    examples = []
    for prompt in questions:
        try:
            answer = str(json.loads(lines[int(prompt.id)])["answer"]).strip()
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"row {prompt.id} has no answer ({first_line(error)})",
                where=str(path),
                mend="install the packages again with `make env`",
            ) from error
        messages = [*messages_for(prompt.turns), {"role": "assistant", "content": answer}]
        tokens, supervised = conversation_tokens(tokenizer, messages)
        if len(tokens) <= max_tokens:
            examples.append(Example(int(prompt.id), tokens, supervised))
    return examples


def split_examples(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what the loss is probed on.

    Raises:
        InputError: nothing to train on or nothing to probe.
    """
    training = [example for example in examples if example.row < PROBE_FROM_ROW]
    probe = [example for example in examples if example.row >= PROBE_FROM_ROW]
    if not training or not probe:
        raise InputError("no conversation is short enough", where="max_tokens", mend="allow longer ones")
    return training, probe


def read_probe_prompts(tokenizer: "PreTrainedTokenizerBase", *, count: int, seed: int) -> list[Prompt]:
    """Prompts that tau is measured on: `count` of the domain, none of them trained on, and a third of that of others.

    Raises:
        InputError: a package is missing or damaged.
    """
    context = SourceContext(tokenizer, seed)
    rows = package.Config(dataset=DATASET).read(context)
    chosen = choose([prompt for prompt in rows if int(prompt.id) >= PROBE_FROM_ROW], limit=count, seed=seed)
    for name in OTHERS.values():
        chosen += package.Config(dataset=name, limit=max(1, count // len((DOMAIN, *OTHERS)))).load(context)
    return chosen


def make_batch(examples: Sequence[Example], *, device: torch.device) -> Batch:
    """Pad conversations to one length.

    Returns:
        `tokens` int64 `[B, T]`, `attention` int64 `[B, T]`, and `labels` int64 `[B, T]`: the token that follows where
        it is to be learned, -1 elsewhere.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens, attention, labels = (torch.full((len(examples), longest), fill) for fill in (0, 0, -1))
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens)
        attention[row, :length] = 1
        wanted = torch.tensor(example.supervised[1:])
        labels[row, : length - 1] = torch.where(wanted, torch.tensor(example.tokens[1:]), -1)
    return {"tokens": tokens.to(device), "attention": attention.to(device), "labels": labels.to(device)}


def answer_loss(model: CausalModel, batch: Batch) -> LossOutput:
    """Cross-entropy of the answers, in nats, summed over their tokens. Only these go through the output head."""
    learned = batch["labels"] >= 0
    states = model.states(batch["tokens"], mask=batch["attention"])[learned]
    logits = model.head(states).float()
    total = functional.cross_entropy(logits, batch["labels"][learned], reduction="sum")
    return LossOutput(loss_sum=total, weight_sum=int(learned.sum()))


@dataclass
class DraftProbe:
    """Measures one draft on targets, always on the same prompts.

    Attributes:
        draft: folder of the draft.
        prompts: what is asked.
        settings: length of answers, block and seed.
        device: where it runs.
        base: records of the unchanged target, to compare with.
    """

    draft: Path
    prompts: list[Prompt]
    settings: Settings
    device: torch.device
    base: list[Record] = field(default_factory=list)

    def measure(self, folder: Path, *, step: int, losses: tuple[float, float] | None = None) -> Point:
        """Tau on the target of a folder; the first one measured is what later ones are compared with.

        Args:
            folder: the target.
            step: optimizer steps made.
            losses: of training and of the probe, if anything was trained.
        """
        precision = _decoding_precision(self.device)
        model = load_target(folder, precision=precision, device=self.device)
        drafter = load_drafter(LoadContext(self.draft, folder, model, precision, self.device))
        arm = Arm("draft", model, drafter, FixedLookahead(self.settings.block))
        records, answer = self._decode(arm)
        self.base = self.base or records
        taus = [
            _tau(self.base, records, domain, temperature, seed=self.settings.seed)
            for temperature in TEMPERATURES
            for domain in (DOMAIN, *OTHERS)
        ]
        train_loss, probe_loss = losses or (None, None)
        return Point(step, target_digest(folder), train_loss, probe_loss, taus, answer)

    def _decode(self, arm: Arm) -> tuple[list[Record], str]:
        """Records of every prompt at every temperature, and the text of the first answer."""
        stops, records, answer = stop_tokens(arm.target), [], ""
        tokenizer, limit = arm.target.tokenizer, self.settings.answer_tokens
        for prompt in self.prompts:
            ids = render_prompt(tokenizer, messages_for(prompt.turns, system=prompt.system))
            name = f"{prompt.source}/{prompt.id}"
            asked = ScorePrompt(name, prompt.domain, torch.tensor(ids, device=self.device))
            for temperature in TEMPERATURES:
                sampling = SamplingSettings(temperature=temperature)
                decoded = decode_validation(arm, asked, arm.lookahead, sampling, limit, stops, self.settings.seed)
                answer = answer or str(tokenizer.decode(decoded.tokens, skip_special_tokens=True))
                records.append(
                    record_of(
                        decoded,
                        prompt_id=name,
                        domain=prompt.domain,
                        temperature=temperature,
                        arm=arm.name,
                        order=0,
                        prompt_tokens=len(ids),
                        draft_bytes=arm.drafter.nbytes(),
                        target_bytes=arm.target.nbytes(),
                        mismatch=None,
                    )
                )
        return records, answer


def _tau(base: list[Record], now: list[Record], domain: str, temperature: float, *, seed: int) -> Tau:
    """Tau and its change; resamples draw prompts, and with a prompt its answers before and after together."""
    before, after = ([r for r in side if (r.domain, r.temperature) == (domain, temperature)] for side in (base, now))
    boot = Bootstrap([r.prompt_id for r in after], seed=seed, resamples=2000)
    old, new = (
        ratio(boot.sums(side, lambda r: r.emitted), boot.sums(side, lambda r: r.passes)) for side in (before, after)
    )
    return Tau(domain, temperature, boot.estimate(new), boot.estimate(ratio(new, old) - 1.0))


def _decoding_precision(device: torch.device) -> str:
    """The arithmetic that is fastest for a few rows, by kind of device; no measurement."""
    wanted = ("packed_by_rows", "fp32_packed", "fp32") if device.type == "cpu" else ("bf16",)
    here = available_precisions(device)
    return next(name for name in wanted if name in here)


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


def write_report(points: Sequence[Point], out: Path, *, settings: Settings, base: Path, draft: Path) -> None:
    """Write `staleness.json`, `.md` and `.png`."""
    data = {
        "settings": settings,
        "base": {"name": base.name, "digest": target_digest(base)},
        "draft": {"name": draft.name, "digest": content_digest(draft)},
        "domain": DOMAIN,
        "points": points,
    }
    write_json(out / f"{REPORT}.json", data)
    write_text(out / f"{REPORT}.md", staleness_markdown(points))
    staleness_plot(points, out / f"{REPORT}.png")


def staleness_markdown(points: Sequence[Point]) -> str:
    """A table for every temperature."""
    text = (
        f"# Staleness of a draft whose target is fine-tuned on {DOMAIN}\n\n"
        "tau counts the bonus token; in brackets 95 % bootstraps over prompts. Changes are relative to step 0, on the "
        "same prompts.\n"
    )
    domains = (DOMAIN, *OTHERS)
    for temperature in TEMPERATURES:
        header = [
            "steps",
            "train loss",
            "probe loss",
            *(f"tau {d}" for d in domains),
            *(f"change {d}" for d in domains),
        ]
        rows = []
        for point in points:
            taus = [point.tau(domain, temperature) for domain in domains]
            losses = ["-" if x is None else f"{x:.3f}" for x in (point.train_loss, point.probe_loss)]
            changes = [_percent(t.change) if point.step else "-" for t in taus]
            rows.append([str(point.step), *losses, *(str(t.tau) for t in taus), *changes])
        text += f"\n## Temperature {temperature:g}\n\n{markdown_table(header, rows)}"
    return text


def _percent(change: Estimate) -> str:
    ends = "" if change.low is None or change.high is None else f" [{change.low:+.1%}, {change.high:+.1%}]"
    return f"{change.value:+.1%}{ends}"


def staleness_plot(points: Sequence[Point], path: Path) -> None:
    """Draw tau over fine-tuning steps by domain, with intervals; dashed at temperature 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    steps = [point.step for point in points]
    for domain in (DOMAIN, *OTHERS):
        for temperature, style in zip(TEMPERATURES, ("-", "--"), strict=True):
            found = [point.tau(domain, temperature).tau for point in points]
            label = f"{domain}, T={temperature:g}"
            panel.plot(steps, [e.value for e in found], style, marker="o", ms=4, color=_COLORS[domain], label=label)
            if temperature == 0.0:
                ends = [(e.value if e.low is None else e.low, e.value if e.high is None else e.high) for e in found]
                low, high = zip(*ends, strict=True)
                panel.fill_between(steps, low, high, color=_COLORS[domain], alpha=0.15, linewidth=0)
    panel.set_xlabel(f"fine-tuning steps of the target on {DOMAIN}")
    panel.set_ylabel("tau of the unchanged draft")
    panel.legend(fontsize="small")
    with replacing(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    pyplot.close(figure)


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
