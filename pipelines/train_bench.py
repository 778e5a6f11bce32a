"""Training against a plain loop of transformers and PyTorch over the same conversations: pace and peak memory.

    python -m pipelines.train_bench

The plain loop is what anyone would write: target and student loaded whole, conversations padded as they are drawn, the
target's pass every step, all logits at once, torch's AdamW as it comes. Ours is `dspark build`'s own training. Arms run
in processes of their own, in turns; `student` is a pruned one, `eagle3` a draft that reads features (its plain loop has
our network, since transformers has none, and runs the target for features every step).
"""

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.corpus import read_corpus
from distill.feature_distillation import FeatureDistillation, draft_vocabulary
from distill.features import capture_features
from distill.objectives.forward_kl import Config as ForwardKL
from inference.feature_drafts import make_network
from inference.loading import load_causal_model, quiet_transformers
from pipelines.files import write_json

ARMS = ("ours", "plain")
DRAFTS = {"student": "pruned", "eagle3": "eagle3"}
_EVERYTHING = 10**9


def words(draft: str, folder: Path, steps: int) -> list[str]:
    """The configuration of our arm; the plain one takes its numbers from it."""
    return [
        f"draft=[none,{DRAFTS[draft]}]",
        "objective=forward_kl",
        "prompts=[stdlib,gsm8k,human_eval,gsm8k_heldout,mt_bench]",
        "budget.responses=64",
        "trainer.precision=fp32",
        f"trainer.steps={steps}",
        "trainer.checkpoint_every_steps=0",
        f"paths.artifacts={folder}/artifacts",
        f"paths.registry={folder}/registry",
    ]


def run_arm(draft: str, arm: str, folder: Path, steps: int) -> dict[str, float]:
    """Train in this process."""
    from hydra import compose, initialize_config_module

    from pipelines.composition import CONF, PRIMARY, VERSION_BASE
    from pipelines.config import register, typed
    from pipelines.training import Lesson, train

    register()
    with initialize_config_module(CONF, version_base=VERSION_BASE):
        cfg = typed(compose(PRIMARY, overrides=words(draft, folder, steps)))
    (manifest,) = (folder / "artifacts" / "corpus").glob("*/manifest.json")
    corpus = manifest.parent
    target = cfg.target.folder(cfg.paths.cache)
    name = DRAFTS[draft]
    if arm == "ours":
        work = folder / "work"
        lesson = Lesson(cfg=cfg, name=name, trainer=cfg.trainer, target_folder=target, corpus=corpus, folder=work)
        result = train(lesson).result
        seconds, tokens = result.step_seconds, result.tokens / result.steps
    else:
        plain = _plain_student if draft == "student" else _plain_eagle
        seconds, tokens = plain(cfg.draft[name], target, corpus, steps, lr=cfg.optimizer.lr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step_seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds, "peak_mib": peak}


def _plain_student(draft: Any, target_folder: Path, corpus: Path, steps: int, *, lr: float) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
        student = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    layers = student.model.layers
    kept = torch.linspace(0, len(layers) - 1, draft.layers).round().int().tolist()
    student.model.layers = nn.ModuleList([layers[index] for index in kept])
    student.get_input_embeddings().requires_grad_(False)
    samples = [s for s in read_corpus(corpus) if s.split == "train"]
    order = random.Random(0)

    def loss() -> tuple[Tensor, float]:
        chosen = order.sample(samples, draft.sequences_per_step)
        ids = nn.utils.rnn.pad_sequence([s.tokens[: draft.max_tokens] for s in chosen], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([s.mask[: draft.max_tokens] for s in chosen], batch_first=True)
        attention = nn.utils.rnn.pad_sequence(
            [torch.ones_like(s.tokens[: draft.max_tokens]) for s in chosen], batch_first=True
        )
        with torch.no_grad():
            teacher = target(input_ids=ids, attention_mask=attention).logits[:, :-1].softmax(-1)
        logits = student(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        rows = nn.functional.kl_div(logits, teacher, reduction="none").sum(-1)
        supervised = mask[:, 1:]
        return (rows * supervised).sum(), float(supervised.sum())

    return _plain_loop([p for p in student.parameters() if p.requires_grad], loss, steps, lr)


def _plain_eagle(draft: Any, target_folder: Path, corpus: Path, steps: int, *, lr: float) -> tuple[float, float]:
    target = load_causal_model(target_folder, precision="fp32", device=torch.device("cpu"))
    target.model.requires_grad_(False)
    samples = list(read_corpus(corpus))
    vocabulary = draft_vocabulary(samples, size=draft.vocabulary, vocab_size=target.vocab_size)
    network = make_network(replace(draft, chunk_tokens=_EVERYTHING), target, vocabulary, seed=0)
    features = partial(capture_features, target, taps=network.taps)
    task = FeatureDistillation(network, target, samples, features_of=features, objective=ForwardKL().build(), seed=0)
    step = iter(range(_EVERYTHING))

    def loss() -> tuple[Tensor, float]:
        sums = task.loss(task.batch(next(step), 0))
        return sums.loss, sums.tokens

    return _plain_loop([p for p in network.parameters() if p.requires_grad], loss, steps, draft.lr or lr)


def _plain_loop(
    parameters: list[nn.Parameter], loss: Callable[[], tuple[Tensor, float]], steps: int, lr: float
) -> tuple[float, float]:
    """Median seconds and mean tokens of a step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    seconds, tokens = [], 0.0
    for _ in range(steps):
        began = time.perf_counter()
        value, count = loss()
        optimizer.zero_grad()
        (value / count).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        tokens += count
    return statistics.median(seconds), tokens / steps


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all arms in turns and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/train_bench"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=12, help="of each arm and round")
    parser.add_argument("--rounds", type=int, default=2, help="how often each arm runs")
    parser.add_argument("--arm", nargs=2, metavar=("DRAFT", "ARM"), help="train one arm here (used by itself)")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    if args.arm:
        sys.stdout.write(json.dumps(run_arm(args.arm[0], args.arm[1], folder, args.steps)) + "\n")
        return 0
    if not (folder / "artifacts" / "corpus").is_dir():
        corpus = [sys.executable, "-m", "pipelines.cli", "corpus", *words("eagle3", folder, args.steps)]
        subprocess.run([*corpus, f"hydra.run.dir={folder}/log"], check=True)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for draft in DRAFTS:
            for arm in ARMS:
                shutil.rmtree(folder / "work", ignore_errors=True)
                command = [sys.executable, "-m", "pipelines.train_bench", "--arm", draft, arm]
                told = ["--folder", str(folder), "--steps", str(args.steps)]
                done = subprocess.run([*command, *told], check=True, stdout=subprocess.PIPE, text=True)
                found.setdefault(f"{draft} {arm}", []).append(json.loads(done.stdout.splitlines()[-1]))
    means = {name: {key: statistics.mean(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    for draft in DRAFTS:
        ours, plain = means[f"{draft} ours"], means[f"{draft} plain"]
        sys.stdout.write(
            f"{draft}: {ours['tokens_per_s']:.0f} against {plain['tokens_per_s']:.0f} supervised tokens/s "
            f"({ours['tokens_per_s'] / plain['tokens_per_s']:.2f}x), {ours['step_seconds']:.2f} against "
            f"{plain['step_seconds']:.2f} s a step, {ours['peak_mib']:.0f} against {plain['peak_mib']:.0f} MiB "
            f"({ours['peak_mib'] / plain['peak_mib']:.2f})\n"
        )
    write_json(folder / "train_bench.json", {"runs": found, "means": means})
    return 0


if __name__ == "__main__":
    sys.exit(main())
