"""Corpora of any size without a target: random tokens, states and features, and prompts of random words.

What they say means nothing; reading and batching them takes what a real corpus of as many conversations would.
"""

import json
import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.conversation import Joined, Sample
from distill.corpus import read_shards, write_shard
from distill.distillation import Distillation
from distill.draft_vocabulary import draft_vocabulary
from distill.feature_distillation import FeatureDistillation
from distill.features import FeatureShards, write_features
from distill.objectives.forward_kl import Config as ForwardKL
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import make_network
from inference.model import CausalModel

HIDDEN, VOCABULARY, TAPS = 32, 512, (0, 1)
_SHARD = 64
_SEQUENCES = 4


def tiny_model() -> CausalModel:
    """Two layers in memory."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return CausalModel(LlamaForCausalLM(config))


def write_corpus(folder: Path, count: int, *, tokens: int, seed: int = 0) -> None:
    """A corpus of `count` conversations of half to one and a half times as many tokens, some of them for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    for index, start in enumerate(range(0, count, _SHARD)):
        samples, features = [], []
        for number in range(start, min(start + _SHARD, count)):
            length = int(torch.randint(tokens // 2, 3 * tokens // 2, (), generator=draw))
            mask = torch.arange(length) >= length // 3
            samples.append(
                Sample(
                    id=f"synthetic/{number}",
                    domain=("chat", "code", "maths")[number % 3],
                    source="synthetic",
                    split="validation" if number % 16 == 1 else "train",
                    tokens=torch.randint(VOCABULARY, (length,), generator=draw),
                    mask=mask,
                    states=torch.randn(length - 1, HIDDEN, generator=draw),
                    text="",
                )
            )
            features.append(torch.randn(length, len(TAPS) * HIDDEN, generator=draw))
        write_features(folder, index, features, TAPS)
        write_shard(folder, index, samples)


def open_corpus(folder: Path) -> int:
    """Read the index, what a student and what a feature draft choose from it, and the draft's vocabulary."""
    return len(_student(folder).train) + len(_feature_draft(folder).train)


def one_epoch(folder: Path) -> int:
    """Every batch of an epoch, for a student and for a feature draft; returns how many."""
    tasks: list[Distillation | FeatureDistillation] = [_student(folder), _feature_draft(folder)]
    steps = [len(task.train) // _SEQUENCES for task in tasks]
    for task, count in zip(tasks, steps, strict=True):
        for step in range(count):
            task.batch(step, 0)
    return sum(steps)


def _student(folder: Path) -> Distillation:
    model = tiny_model()
    return Distillation(
        model,
        model,
        Joined(read_shards(folder)),
        objective=ForwardKL().build(),
        sequences_per_step=_SEQUENCES,
        max_tokens=512,
        chunk_tokens=128,
        seed=0,
        bucket_batches=16,
    )


def _feature_draft(folder: Path) -> FeatureDistillation:
    model, shards = tiny_model(), read_shards(folder)
    vocabulary = draft_vocabulary(Joined(shards), size=VOCABULARY // 4, vocab_size=VOCABULARY)
    network = make_network(Eagle3(sequences_per_step=_SEQUENCES, taps=list(TAPS)), model, vocabulary, seed=0)
    features = FeatureShards(folder, shards, taps=TAPS).of
    return FeatureDistillation(
        network, model, Joined(shards), features_of=features, objective=ForwardKL().build(), seed=0
    )


def write_prompts(path: Path, count: int, *, seed: int) -> None:
    """JSONL of questions of twenty random words each."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(4096)]
    lines = [
        json.dumps(
            {"id": f"{seed}-{number}", "messages": [{"role": "user", "content": " ".join(draw.choices(words, k=20))}]}
        )
        for number in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
