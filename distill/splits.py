"""From sources to one set of prompts: held out by prompt, checked for overlap, split by domain, with digests.

Nothing here depends on the order in which sources are configured except which of two equal prompts stays.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distill.contamination import ContaminationReport, deduplicate, filter_contaminated
from distill.prompts import Prompt, SourceConfig, SourceContext, choose, rank
from inference.errors import InputError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True)
class PromptSet:
    """Prompts by split. Train and validation are for the draft to learn from; heldout is for scores only."""

    train: list[Prompt]
    validation: list[Prompt]
    heldout: list[Prompt]
    report: ContaminationReport
    """What was dropped from train and validation, per source."""

    def split(self, name: str) -> list[Prompt]:
        """Return the split of that name: train, validation or heldout."""
        return {"train": self.train, "validation": self.validation, "heldout": self.heldout}[name]

    def by_domain(self, name: str) -> dict[str, list[Prompt]]:
        """Return a split's prompts per domain, domains sorted, prompts in their order."""
        return by_domain(self.split(name))

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of prompts by split and domain."""
        return {name: {domain: len(group) for domain, group in self.by_domain(name).items()} for name in SPLITS}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of ids and texts, per split."""
        return {name: prompts_digest(self.split(name)) for name in SPLITS}


def prepare_prompts(
    sources: Mapping[str, SourceConfig],
    context: SourceContext,
    *,
    validation_share: float,
    seed: int,
    ngram_words: int = 10,
) -> PromptSet:
    """Read all sources, drop training prompts that overlap with held-out ones, and split the rest.

    Training prompts are checked against every prompt of the held-out sources, also those that a source's `limit` leaves
    out of this run. Validation takes `validation_share` of each domain (at least one prompt where a domain has two),
    chosen by a hash of the id, so that adding a source does not move the others' prompts between splits much.

    Args:
        sources: settings by name; the name becomes `Prompt.source` and the first part of `Prompt.id`.
        context: tokenizer, seed and sampler for the sources.
        validation_share: share of training prompts kept for validation, 0 <= share < 1.
        seed: decides the validation split.
        ngram_words: length of a shared run of words that counts as overlap.

    Raises:
        InputError: a source is bad, two of its prompts have one id, or no held-out or no training prompt is left.
        ValueError: validation_share out of range.
    """
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}: use 0 <= validation_share < 1")
    training: list[Prompt] = []
    heldout: list[Prompt] = []
    checked: list[Prompt] = []
    context = replace(context, sources=sources)
    for name, source in sources.items():
        prompts = _named(context.prompts_of(name), name=name)
        chosen = choose(prompts, limit=source.limit, seed=context.seed)
        if source.heldout:
            checked += prompts
            heldout += chosen
        else:
            training += chosen
    if not heldout:
        raise InputError(
            f"no held-out prompts in {', '.join(sources) or 'an empty list of sources'}",
            where="prompts",
            mend="add a source with heldout=true, such as human_eval, gsm8k_heldout or mt_bench",
        )
    kept, report = filter_contaminated(training, heldout=checked, ngram_words=ngram_words)
    _log(report)
    if not kept:
        raise InputError(
            f"no training prompts are left ({len(training)} loaded)",
            where="prompts",
            mend="add a source with heldout=false that does not overlap with the held-out prompts",
        )
    validation = _validation_ids(kept, share=validation_share, seed=seed)
    return PromptSet(
        train=[prompt for prompt in kept if prompt.id not in validation],
        validation=[prompt for prompt in kept if prompt.id in validation],
        heldout=deduplicate(heldout),
        report=report,
    )


def by_domain(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Group prompts by domain, domains sorted, prompts in their order."""
    domains = sorted({prompt.domain for prompt in prompts})
    return {domain: [prompt for prompt in prompts if prompt.domain == domain] for domain in domains}


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of ids, domains and texts in order, as hexadecimal digits."""
    rows = [[prompt.id, prompt.domain, prompt.system, list(prompt.turns)] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def _named(prompts: Sequence[Prompt], *, name: str) -> list[Prompt]:
    """Give prompts the source's name and put it in front of their ids, which must differ."""
    repeated = [prompt_id for prompt_id, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise InputError(
            f"{len(repeated)} ids occur more than once, {repeated[0]!r} among them",
            where=f"prompts.{name}",
            mend="give every record its own id, or none",
        )
    return [replace(prompt, id=f"{name}/{prompt.id}", source=name) for prompt in prompts]


def _validation_ids(prompts: Sequence[Prompt], *, share: float, seed: int) -> set[str]:
    """Choose `share` of each domain's prompts, rounded, at least one if the domain has two and the share is not 0."""
    chosen: set[str] = set()
    for group in by_domain(prompts).values():
        least = 1 if share > 0 and len(group) > 1 else 0
        number = max(least, round(share * len(group)))
        number = min(number, len(group) - 1)
        chosen.update(sorted((prompt.id for prompt in group), key=lambda name: rank(name, seed=seed))[:number])
    return chosen


def _log(report: ContaminationReport) -> None:
    for name, counts in [*report.sources.items(), ("all sources", report.total)]:
        log.info(
            "%s: %d training prompts, %d duplicates and %d overlapping with held-out prompts dropped, %d kept",
            name,
            counts.loaded,
            counts.duplicates,
            counts.contaminated,
            counts.kept,
        )
