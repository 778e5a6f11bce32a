"""One arm of the training row, in a process of its own: `python -m pipelines.bench.training_arms eagle3 ours ...`.

`ours` is what `dspark build` does. `plain` is what anyone would write with transformers and PyTorch: target and student
loaded whole, conversations padded as they are drawn, the target's pass every step, all logits at once, torch's AdamW as
it comes; its EAGLE-3 has our network, since transformers has none. `public` is the step of the public EAGLE-3 trainers
(`pipelines.bench.public_eagle3`). Prints one line of JSON.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.conversation import Conversation
from distill.corpus import read_corpus
from distill.draft_vocabulary import draft_vocabulary
from distill.feature_distillation import FeatureDistillation
from distill.features import capture_features
from distill.objectives.forward_kl import Config as ForwardKL
from inference.feature_networks import make_network
from inference.feature_networks._layers import DraftShape
from inference.loading import load_causal_model, quiet_transformers
from pipelines.bench.public_eagle3 import PublicEagle3, public_loss
from train.memory import device_peak, resident_peak

ARMS = {"student": ("ours", "plain"), "eagle3": ("ours", "plain", "public")}
KINDS = {"student": "pruned", "eagle3": "eagle3"}
_EVERYTHING = 10**9

Step = Callable[[], tuple[Tensor, float]]
"""The mean loss of a step, with its graph, and how many tokens it is over."""


@dataclass(frozen=True)
class Pupil:
    """What the plain arms start from.

    Attributes:
        draft: settings of the draft.
        target: folder.
        corpus: folder.
        lr: of the optimizer.
        device: of everything.
        unroll: steps of the public one.
    """

    draft: Any
    target: Path
    corpus: Path
    lr: float
    device: torch.device
    unroll: int

    def model(self) -> Any:
        """The target as transformers loads it."""
        from transformers import AutoModelForCausalLM

        with quiet_transformers():
            return nn.Module.to(AutoModelForCausalLM.from_pretrained(self.target, dtype=torch.float32), self.device)

    def drawn(self, samples: Sequence[Conversation], order: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, attention and the assistant's tokens of some conversations, padded on the right."""
        chosen = order.sample(samples, min(self.draft.sequences_per_step, len(samples)))
        cut = self.draft.max_tokens
        rows = [sample.tokens[:cut] for sample in chosen]
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        masks = pad([sample.mask[:cut] for sample in chosen])
        return (
            pad(rows).to(self.device),
            pad([torch.ones_like(row) for row in rows]).to(self.device),
            masks.to(self.device),
        )


def run_arm(draft: str, arm: str, folder: Path, steps: int, words: Sequence[str]) -> dict[str, float]:
    """Train in this process.

    Args:
        draft: `student` or `eagle3`.
        arm: see the module.
        folder: with the corpus, and for checkpoints.
        steps: optimizer steps.
        words: of the configuration.
    """
    from hydra import compose, initialize_config_module

    from pipelines.composition import CONF, PRIMARY, VERSION_BASE
    from pipelines.config import register, typed
    from pipelines.training import Lesson, train

    register()
    with initialize_config_module(CONF, version_base=VERSION_BASE):
        cfg = typed(compose(PRIMARY, overrides=list(words)))
    (manifest,) = (folder / "artifacts" / "corpus").glob("*/manifest.json")
    corpus, target, name = manifest.parent, cfg.target.folder(cfg.paths.cache), KINDS[draft]
    settings = cfg.draft[name]
    if arm == "ours":
        work = folder / "work"
        lesson = Lesson(cfg=cfg, name=name, trainer=cfg.trainer, target_folder=target, corpus=corpus, folder=work)
        result = train(lesson).result
        seconds, tokens = result.step_seconds, result.tokens / result.steps
    else:
        unroll = getattr(settings, "block", 0)
        pupil = Pupil(settings, target, corpus, cfg.optimizer.lr, cfg.target.torch_device(), unroll)
        make = {"student": _plain_student, "eagle3": _plain_eagle3}[draft] if arm == "plain" else _public_eagle3
        seconds, tokens = _looped(*make(pupil), steps, lr=getattr(settings, "lr", 0.0) or pupil.lr)
    peak = device_peak() or resident_peak()
    return {"step_seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds, "peak_mib": peak / 2**20}


def _plain_student(pupil: Pupil) -> tuple[list[nn.Parameter], Step]:
    target, student = pupil.model().eval(), pupil.model()
    layers = student.model.layers
    kept = torch.linspace(0, len(layers) - 1, pupil.draft.layers).round().int().tolist()
    student.model.layers = nn.ModuleList([layers[index] for index in kept])
    student.get_input_embeddings().requires_grad_(False)
    samples = [s for s in read_corpus(pupil.corpus) if s.split == "train"]
    order = random.Random(0)

    def step() -> tuple[Tensor, float]:
        ids, attention, mask = pupil.drawn(samples, order)
        with torch.no_grad():
            teacher = target(input_ids=ids, attention_mask=attention).logits[:, :-1].softmax(-1)
        logits = student(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        rows = nn.functional.kl_div(logits, teacher, reduction="none").sum(-1)
        supervised = mask[:, 1:]
        count = float(supervised.sum())
        return (rows * supervised).sum() / count, count

    return [p for p in student.parameters() if p.requires_grad], step


def _plain_eagle3(pupil: Pupil) -> tuple[list[nn.Parameter], Step]:
    target = load_causal_model(pupil.target, precision="fp32", device=pupil.device)
    target.model.requires_grad_(False)
    samples = list(read_corpus(pupil.corpus))
    vocabulary = draft_vocabulary(samples, size=pupil.draft.vocabulary, vocab_size=target.vocab_size)
    network = make_network(replace(pupil.draft, chunk_tokens=_EVERYTHING), target, vocabulary, seed=0)
    features = partial(capture_features, target, taps=network.taps)
    task = FeatureDistillation(network, target, samples, features_of=features, objective=ForwardKL().build(), seed=0)
    steps = iter(range(_EVERYTHING))

    def step() -> tuple[Tensor, float]:
        sums = task.loss(task.batch(next(steps), 0))
        return sums.loss / sums.tokens, float(sums.tokens)

    return [p for p in network.parameters() if p.requires_grad], step


def _public_eagle3(pupil: Pupil) -> tuple[list[nn.Parameter], Step]:
    target = pupil.model().eval()
    target.requires_grad_(False)
    samples = [s for s in read_corpus(pupil.corpus) if s.split == "train"]
    shape = DraftShape.of(target.config)
    chosen = draft_vocabulary(samples, size=pupil.draft.vocabulary, vocab_size=shape.vocab)
    vocabulary = (torch.arange(shape.vocab) if chosen is None else chosen).to(pupil.device)
    taps = pupil.draft.tapped_layers(shape.target_layers)
    network = PublicEagle3(
        target.get_input_embeddings(),
        taps=len(taps),
        shape=(shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate),
        vocabulary=len(vocabulary),
        theta=shape.rope_theta,
    ).to(pupil.device)
    order = random.Random(0)

    def step() -> tuple[Tensor, float]:
        ids, attention, mask = pupil.drawn(samples, order)
        return public_loss(
            network,
            target,
            tokens=ids,
            attention=attention,
            mask=mask,
            taps=taps,
            vocabulary=vocabulary,
            unroll=pupil.unroll,
        )

    return [p for p in network.parameters() if p.requires_grad], step


def _looped(parameters: list[nn.Parameter], step: Step, steps: int, *, lr: float) -> tuple[float, float]:
    """Median seconds and mean tokens of a step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    seconds, tokens = [], 0.0
    for _ in range(steps):
        began = time.perf_counter()
        loss, count = step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        seconds.append(time.perf_counter() - began)
        tokens += count
    return statistics.median(seconds), tokens / steps


def main(argv: Sequence[str] | None = None) -> int:
    """Train one arm and print what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("draft", choices=sorted(ARMS))
    parser.add_argument("arm", choices=("ours", "plain", "public"))
    parser.add_argument("--folder", type=Path, required=True, help="with the corpus")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=0, help="of the processor")
    parser.add_argument("--words", nargs="*", default=[], help="of the configuration")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    sys.stdout.write(json.dumps(run_arm(args.draft, args.arm, args.folder, args.steps, args.words)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
