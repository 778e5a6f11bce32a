"""A corpus larger than the memory it may take is learned from whole: what is read is not kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.corpus import Sample, write_shard
from distill.features import write_features
from tests.distill.large_corpus_program import SEQUENCES, TAPS

SHARDS, SAMPLES, TOKENS = 40, 8, 128
STATE_WIDTH, FEATURE_WIDTH = 1024, 1536
# 41 thousand tokens: states of 2 KiB, features of two layers of 3 KiB each.
CORPUS_MIB = SHARDS * SAMPLES * TOKENS * 2 * (STATE_WIDTH + len(TAPS) * FEATURE_WIDTH) / 2**20
STATES_MIB = SHARDS * SAMPLES * TOKENS * 2 * STATE_WIDTH / 2**20
# One shard's features are 6 MiB, a batch of four conversations with states and features 4 MiB, and its copies.
ALLOWED_MIB = 24.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many shards with states everywhere and features."""
    folder = tmp_path_factory.mktemp("large")
    for index in range(SHARDS):
        samples = [
            Sample(
                id=f"{index}-{place}",
                domain="chat",
                source="made",
                split="train",
                tokens=torch.arange(TOKENS) % 48,
                mask=torch.arange(TOKENS) >= 16 + place,
                states=torch.full((TOKENS - 1, STATE_WIDTH), 1.0, dtype=torch.bfloat16),
                text="",
            )
            for place in range(SAMPLES)
        ]
        write_features(folder, index, [torch.ones(TOKENS, len(TAPS) * FEATURE_WIDTH)] * SAMPLES, TAPS)
        write_shard(folder, index, samples)
    return folder


def test_an_epoch_of_a_large_corpus_takes_little_memory(corpus: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    # One pool for all threads: what is freed in one is used in another.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.distill.large_corpus_program", str(corpus)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {steps for steps, _ in found.values()} == {SHARDS * SAMPLES // SEQUENCES}
    assert CORPUS_MIB > 300
    assert found["student"][1] < ALLOWED_MIB
    assert found["features"][1] < ALLOWED_MIB
    # A reader that keeps what it read is noticed.
    assert found["copies"][1] > 0.9 * STATES_MIB > ALLOWED_MIB
