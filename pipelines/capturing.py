"""What a corpus lacks of its target, captured before training: states, and features of the layers that a draft reads.

Each process of a training captures its share of the shards into the training's folder; a shard that is there is not
captured again. Where no target layer is wanted any more, the target lets them go.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from distill.conversation import in_memory
from distill.corpus import StoredSamples, read_shards, shard_written, write_shard
from distill.distillation import capture_states
from distill.feature_distillation import FeaturesOf
from distill.features import (
    FeatureShards,
    capture_features,
    feature_bytes,
    features_path,
    kept_taps,
    write_features,
)
from inference.layers import drop_layers
from inference.model import CausalModel
from inference.parallel import ParallelModel
from pipelines.company import Company
from pipelines.progress import tracked

logger = logging.getLogger(__name__)

FEATURES, STATED = "features", "stated"
"""Folders of what was captured, below that of the training."""


def _captured(
    company: Company,
    shards: Sequence[StoredSamples],
    *,
    what: str,
    there: Callable[[int], bool],
    write: Callable[[int], None],
    idle: Callable[[], object] | None,
) -> None:
    """Capture something of every shard that lacks it: each process its share.

    Args:
        company: the processes.
        shards: of the corpus.
        what: for the progress line.
        there: whether a shard has it already.
        write: captures that of one shard.
        idle: one conversation's pass, for a process that has done while others, whose target it holds a part of, have
            not; None where each has a target of its own.
    """
    own = [index for index in range(len(shards)) if index % company.size == company.rank and not there(index)]
    calls = sum(len(shards[index]) for index in own)
    most = max(map(int, company.of_all(str(calls)))) if idle else calls

    def work() -> None:
        for index in tracked(own, what, unit="shards") if company.rank == 0 else own:
            write(index)
        for _ in range(most - calls):
            assert idle is not None, "a process with a target of its own waits for nobody"
            idle()

    company.together(work)


def captured_states(
    folder: Path, company: Company, target: CausalModel, shards: list[StoredSamples], *, spread: bool
) -> list[StoredSamples]:
    """The corpus, shard by shard, with the states that its generator did not keep.

    Args:
        folder: of the training; what is captured goes below it.
        company: the processes that train together; all of them call this.
        target: the teacher, whole or spread.
        shards: of the corpus.
        spread: whether the target's layers lie in several processes.
    """
    if all(sample.has_states for shard in shards for sample in shard):
        return shards
    folder = folder / STATED
    folder.mkdir(parents=True, exist_ok=True)
    bare = in_memory(shards[0][0], states=None)
    _captured(
        company,
        shards,
        what="states",
        there=partial(shard_written, folder),
        write=lambda index: write_shard(folder, index, capture_states(target, shards[index])),
        idle=(lambda: capture_states(target, [bare])) if spread else None,
    )
    return company.together(lambda: read_shards(folder))


def captured_features(
    corpus: Path,
    folder: Path,
    company: Company,
    target: CausalModel,
    shards: Sequence[StoredSamples],
    taps: list[int],
    *,
    spread: bool,
    resident: bool,
) -> FeaturesOf:
    """Features by sample: the corpus's own where it kept these layers; else captured beside the draft, each process its
    share of the shards, if the disk has room; else from the target again whenever a batch asks.

    Args:
        corpus: its folder.
        folder: of the training; what is captured goes below it.
        company: the processes that train together; all of them call this.
        target: the teacher, whole or spread; its layers are let go once nothing reads them.
        shards: of the corpus.
        taps: layers the draft reads.
        spread: whether the target's layers lie in several processes.
        resident: keep them on a GPU that has room for them.
    """

    def opened(folder: Path) -> FeaturesOf:
        shards_of = FeatureShards(folder, shards, taps=taps)
        return (shards_of.resident(target.device) if resident else shards_of).of

    kept = company.together(lambda: kept_taps(corpus))
    if set(taps) <= set(kept):
        let_layers_go(target)
        return company.together(lambda: opened(corpus))
    folder = folder / FEATURES
    size, room = _needed_bytes(folder, shards, target, len(taps)), _room_bytes(folder.parent)
    size, room = json.loads(company.of_first(json.dumps([size, room])))
    if size > room:
        if company.rank == 0:
            said = f"features need {size / 2**20:.0f} MiB, there is room for {room / 2**20:.0f}"
            logger.warning("%s: the target runs again every step", said)
        return partial(capture_features, target, taps=taps)
    if company.rank == 0:
        logger.info("the corpus kept no features of layers %s: capturing %.0f MiB", taps, size / 2**20)

    folder.mkdir(parents=True, exist_ok=True)
    _captured(
        company,
        shards,
        what="features",
        there=lambda index: features_path(folder, index).is_file(),
        write=lambda index: write_features(
            folder, index, [capture_features(target, s, taps) for s in shards[index]], taps
        ),
        idle=(lambda: capture_features(target, shards[0][0], taps)) if spread else None,
    )
    let_layers_go(target)
    return company.together(lambda: opened(folder))


def _needed_bytes(folder: Path, shards: Sequence[StoredSamples], target: CausalModel, num_taps: int) -> int:
    """Bytes of features that are still to be captured."""
    missing = [shard for index, shard in enumerate(shards) if not features_path(folder, index).is_file()]
    tokens = sum(sample.num_tokens for shard in missing for sample in shard)
    hidden = target.model.config.get_text_config(decoder=True).hidden_size
    return feature_bytes(tokens=tokens, hidden=hidden, num_taps=num_taps)


def _room_bytes(folder: Path) -> float:
    """Bytes that features may take: half of what is free."""
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder).free / 2


def let_layers_go(target: CausalModel) -> None:
    """Free the target's layers: from here on its embedding and its head are all that is used."""
    if not isinstance(target, ParallelModel):  # whose layers the other processes feed too
        drop_layers(target.model)
