"""The corpus shard by shard: what decides a shard, and which of several processes writes it.

A shard depends on the prompts, the settings and its own number alone. So where the target fits one device, every
process of a run has a target of its own and takes its share of the shards that are missing, without a word to the
others until all have done; the bytes are those that one process writes. Otherwise the target is spread over the
processes, and the first one writes them all (`inference.parallel`).
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.corpus import shard_written, write_shard
from distill.features import write_features
from distill.responses._context import AnswerContext
from distill.responses.local import Config as LocalResponses
from inference import parallel, processes
from inference.errors import InputError
from inference.loading import load_causal_model
from inference.model import CausalModel, load_tokenizer
from inference.placement import fits_one, undivided
from inference.plugins import plugin
from inference.precision import is_packed
from inference.target import TargetConfig, stop_tokens
from pipelines.company import Company
from pipelines.config import RunConfig
from pipelines.files import writing
from pipelines.progress import tracked

logger = logging.getLogger(__name__)

TASK = "corpus"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Everything that decides the shards of a corpus, as every process knows it.

    Attributes:
        folder: of the corpus, prompts written.
        target_folder: the target's files.
        target: its settings.
        precision: its arithmetic.
        corpus: how it answers.
        seed: of the run.
        taps: layers whose features are kept.
        rows: of each shard, the lines of its prompts in the corpus's file.
    """

    folder: Path
    target_folder: Path
    target: TargetConfig
    precision: str
    corpus: Any
    seed: int
    taps: list[int] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """All of it, as JSON can hold it; paths are absolute."""
        folders = {name: str(getattr(self, name).resolve()) for name in ("folder", "target_folder")}
        settings = {"target": asdict(self.target), "corpus": asdict(self.corpus)}
        return {**vars(self), **folders, **settings}

    @classmethod
    def from_plain(cls, given: dict[str, Any]) -> "Shards":
        """What `plain` gave."""
        folders = {name: Path(given[name]) for name in ("folder", "target_folder")}
        corpus = plugin("distill.responses", given["corpus"]["kind"]).Config(**given["corpus"])
        return cls(**{**given, **folders, "target": TargetConfig(**given["target"]), "corpus": corpus})

    def load(self, company: Company) -> CausalModel:
        """The target, whole, where this process has its device."""
        device = company.own(self.target.torch_device())
        return load_causal_model(
            self.target_folder, precision=self.precision, device=device, attention=self.target.attention
        )


@dataclass(frozen=True)
class Share:
    """What one process has written.

    Attributes:
        shards: how many.
        tokens: the target's own in them.
        load_seconds: until its target was there; 0 where it was already, or was not needed.
        seconds: of answering and writing.
    """

    shards: int
    tokens: int
    load_seconds: float
    seconds: float


def sharing_group(cfg: RunConfig, target_folder: Path, *, precision: str) -> processes.Group | None:
    """The processes that share out the shards; None where this one writes all, alone or with a target spread over them.

    Args:
        cfg: of the run; `processes.corpus` decides.
        target_folder: the target's files.
        precision: in which it answers.
    """
    group, how = processes.current(), cfg.processes.corpus
    if group is None or not cfg.corpus.needs_target():
        return None
    whole = "packed weights" if is_packed(precision) else undivided(target_folder, size=group.size)
    if how == "tensor" and not whole:
        return None
    if how == "auto" and not whole and not _fits_each(cfg.target, target_folder, precision, group.size):
        logger.info("the target is spread over %d processes, which write the corpus together", group.size)
        return None
    logger.info("%d processes share out the corpus, each with a target of its own", group.size)
    return group


def _fits_each(target: TargetConfig, folder: Path, precision: str, size: int) -> bool:
    """Whether every process can have the weights to itself, as far as settings and sizes tell."""
    if target.spread_teacher:
        return False
    return fits_one(folder, precision=precision, device=target.torch_device(), size=size)[0]


def write_missing(
    shards: Shards, target: Callable[[], CausalModel], *, group: processes.Group | None = None
) -> list[Share]:
    """Write the shards that are not there.

    Args:
        shards: what they are to hold.
        target: gives this process's model, when first needed.
        group: the processes that share them out; None for this one alone. This is the first of them.

    Returns:
        What each process has done, in the order of ranks; those that were not called are left out.

    Raises:
        InputError: a process cannot load the target, cannot answer, or has no room on its disk.
        ProcessLost: one is gone.
    """
    missing = [index for index in range(len(shards.rows)) if not shard_written(shards.folder, index)]
    company = Company(group if len(missing) > 1 else None)  # a single shard is nothing to share out
    if company.group:
        parallel.call_to(company.group, TASK, {"shards": shards.plain(), "missing": missing})
    return _take_part(company, lambda: _write(shards, missing, target, company))


def come(group: processes.Group, given: dict[str, Any]) -> None:
    """What the other processes do when called. What goes wrong for all is said by the first."""
    company = Company(group)

    def work() -> Share:
        shards = Shards.from_plain(given["shards"])
        return _write(shards, given["missing"], lambda: shards.load(company), company)

    with suppress(InputError):
        _take_part(company, work)


def dealt(missing: Sequence[int], *, rank: int, size: int) -> list[int]:
    """The shards that one process writes. Later ones have longer prompts, so every other round is dealt backwards."""
    rounds = [list(missing[start : start + size]) for start in range(0, len(missing), size)]
    places = [rank if number % 2 == 0 else size - 1 - rank for number in range(len(rounds))]
    return [dealt[place] for dealt, place in zip(rounds, places, strict=True) if place < len(dealt)]


def _take_part(company: Company, work: Callable[[], Share]) -> list[Share]:
    """This process's share, and what all have done when the last has done its own."""
    share = company.together(work)
    return [Share(*json.loads(said)) for said in company.of_all(json.dumps(list(vars(share).values())))]


def _write(shards: Shards, missing: Sequence[int], target: Callable[[], CausalModel], company: Company) -> Share:
    """Write what is this process's of the missing shards."""
    from pipelines.corpus import read_prompts  # which imports this module

    mine = dealt(missing, rank=company.rank, size=company.size)
    if not mine:
        return Share(0, 0, 0.0, 0.0)
    prompts, tokenizer = read_prompts(shards.folder), load_tokenizer(shards.target_folder)
    began, context = time.perf_counter(), AnswerContext(tokenizer, frozenset(), None, shards.taps)
    if shards.corpus.needs_target():
        model = target()
        context = AnswerContext(tokenizer, stop_tokens(model), model, shards.taps)
        if isinstance(shards.corpus, LocalResponses):
            shards.corpus.prepare([prompts[row].prompt for index in mine for row in shards.rows[index]], context)
    loaded, tokens = time.perf_counter(), 0
    unit = "shards" if company.size == 1 else "shards of each process"
    for index in mine if company.rank else tracked(mine, "corpus", unit=unit):
        chosen = [prompts[row] for row in shards.rows[index]]
        with writing(shards.folder):
            samples = shards.corpus.answer(
                [p.prompt for p in chosen],
                splits=[p.split for p in chosen],
                context=context,
                seed=shards.seed * 1_000_003 + index * 1_009,
            )
            kept = [sample.features for sample in samples if sample.features is not None]
            if shards.taps and len(kept) == len(samples):
                write_features(shards.folder, index, kept, shards.taps, compressed=is_compressed(shards.corpus))
            write_shard(shards.folder, index, samples)
        tokens += sum(int(sample.mask.sum()) for sample in samples)
    return Share(len(mine), tokens, loaded - began, time.perf_counter() - loaded)


def is_compressed(corpus: object) -> bool:
    """Whether features are kept as 8-bit numbers."""
    return isinstance(corpus, LocalResponses) and corpus.compress_features
