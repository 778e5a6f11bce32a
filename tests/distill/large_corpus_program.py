"""Makes every batch of an epoch from a corpus on disk and says how much memory that took.

    python -m tests.distill.large_corpus_program FOLDER

Prints one JSON object: for a student, a feature draft, and a reader that keeps all it read, to show that the figure
tells, the batches made and by how many MiB the anonymous memory of this process had grown at most.
"""

import json
import logging
import sys
from pathlib import Path

import torch

from distill.conversation import Joined, in_memory
from distill.corpus import read_shards
from distill.distillation import Distillation
from distill.feature_distillation import FeatureDistillation
from distill.features import FeatureShards
from distill.objectives import forward_kl
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import make_network
from tests.inference.families import family_model

Task = Distillation | FeatureDistillation
SEQUENCES = 4
TAPS = [0, 1]


def anonymous_mib() -> float:
    """Memory of this process that no file backs."""
    [line] = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def main(folder: Path) -> dict[str, tuple[int, float]]:
    """Open the corpus once for each reader and make its batches."""
    logging.disable()
    target = family_model("llama")
    network = make_network(Eagle3(sequences_per_step=SEQUENCES, layers=1, block=2), target, None, seed=0)
    objective = forward_kl.Config().build()
    # What torch and its allocator need once is none of the corpus's.
    torch.zeros(1 << 20).bfloat16()
    before = anonymous_mib()

    def student() -> Task:
        return Distillation(
            target,
            target,
            Joined(read_shards(folder)),
            objective=objective,
            sequences_per_step=SEQUENCES,
            max_tokens=512,
            chunk_tokens=64,
            seed=0,
            bucket_batches=16,
        )

    def feature_draft() -> Task:
        shards = read_shards(folder)
        features_of = FeatureShards(folder, shards, taps=TAPS).of
        samples = Joined(shards)
        return FeatureDistillation(network, target, samples, features_of=features_of, objective=objective, seed=0)

    found = {}
    for name, make in (("student", student), ("features", feature_draft), ("copies", student)):
        task, peak = make(), 0.0
        kept = [in_memory(s, states=s.states_of(s.stated)) for s in task.train] if name == "copies" else []
        steps = len(task.train) // SEQUENCES
        for step in range(steps):
            task.batch(step, 0)
            peak = max(peak, anonymous_mib() - before)
        del kept
        found[name] = steps, peak
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
