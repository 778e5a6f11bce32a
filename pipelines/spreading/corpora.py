"""A corpus written by one process and shared out among all: the same bytes, and the target's tokens a second.

Strong scaling: the same shards either way. Seconds are of answering and writing; the target is loaded before, and what
that took is said beside them.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distill.corpus import shard_name
from distill.prompts import Prompt
from inference.processes import Group
from pipelines.bench.paired import Sample, median_seconds, speed, speed_ratio
from pipelines.company import Company
from pipelines.corpus import PROMPTS_FILE
from pipelines.corpus_shards import Shards, Share, write_missing
from pipelines.files import write_text

ONE, ALL = "one process", "shared out"


def measure_corpus(
    group: Group, shards: Shards, prompts: Sequence[Prompt], *, rounds: int, seed: int
) -> dict[str, Any]:
    """Write all shards in every round, both ways.

    Args:
        group: the processes.
        shards: what is written, below its folder; rows are lines of `prompts`.
        prompts: of the corpus.
        rounds: how often, after one that warms up.
        seed: of the orders.

    Returns:
        Whether the bytes are the same, seconds, tokens/s, and their ratio.
    """
    model = shards.load(Company(group))
    shares: dict[str, list[list[Share]]] = {ONE: [], ALL: []}
    same: list[bool] = []

    def write(arm: str) -> float:
        own = replace(shards, folder=shards.folder / arm.replace(" ", "-"))
        shutil.rmtree(own.folder, ignore_errors=True)
        own.folder.mkdir(parents=True)
        lines = [json.dumps({"split": "train", "prompt": asdict(prompt)}) for prompt in prompts]
        write_text(own.folder / PROMPTS_FILE, "\n".join(lines) + "\n")
        shares[arm].append(write_missing(own, lambda: model, group=group if arm == ALL else None))
        return float(sum(share.tokens for share in shares[arm][-1]))

    for number in range(1 + rounds):
        for arm in (ONE, ALL) if number % 2 else (ALL, ONE):
            write(arm)
        same.append(_same(shards.folder, len(shards.rows)))
    samples = [
        Sample(str(number), arm, 0, sum(s.tokens for s in told), max(s.seconds for s in told))
        for arm, every in shares.items()
        for number, told in enumerate(every[1:])  # the first round warms up
    ]
    return {
        "shards": len(shards.rows),
        "conversations": len(prompts),
        "tokens": sum(share.tokens for share in shares[ONE][0]),
        "same_bytes": all(same),
        "seconds": {arm: asdict(median_seconds(samples, arm, seed=seed)) for arm in shares},
        "tokens_per_s": {arm: asdict(speed(samples, arm, seed=seed)) for arm in shares},
        "shared_out_over_one": asdict(speed_ratio(samples, ALL, ONE, seed=seed)),
        "load_seconds": max(share.load_seconds for share in shares[ALL][-1]),
        "processes": [asdict(share) for share in shares[ALL][-1]],
    }


def _same(folder: Path, num_shards: int) -> bool:
    """Whether both ways have written the same files."""
    one, shared = (
        {file.name: file.read_bytes() for file in (folder / arm.replace(" ", "-")).iterdir()} for arm in (ONE, ALL)
    )
    whole = all(f"{shard_name(index)}.safetensors" in one for index in range(num_shards))
    return whole and one == shared
