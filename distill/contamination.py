"""Keep held-out prompts out of training: exact copies and shared ten-word runs are dropped, and counted per source.

Works on what users say; answers do not exist yet, and system messages are left out because whole corpora share one.
Linear in the number of words: held-out runs are hashed into one set, training runs are looked up in it.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from distill.prompts import Prompt

# Scripts written without spaces (kana, Chinese, Hangul) count one word a character: a whole sentence would be one word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


@dataclass
class SourceCounts:
    """What happened to the prompts of one source; `loaded` is the sum of the other three."""

    loaded: int = 0
    duplicates: int = 0
    """Dropped: the same text was seen before, in this source or an earlier one."""
    contaminated: int = 0
    """Dropped: shares a run of words with a held-out prompt, or is a copy of a short one."""
    kept: int = 0


@dataclass
class ContaminationReport:
    """Counts per training source, and which prompts went because of which held-out ones were found in them."""

    ngram_words: int
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    contaminated_ids: list[str] = field(default_factory=list)

    @property
    def total(self) -> SourceCounts:
        """Counts over all sources."""
        counts = self.sources.values()
        return SourceCounts(
            loaded=sum(c.loaded for c in counts),
            duplicates=sum(c.duplicates for c in counts),
            contaminated=sum(c.contaminated for c in counts),
            kept=sum(c.kept for c in counts),
        )

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain JSON values, for a manifest."""
        return asdict(self)


def words(text: str) -> list[str]:
    """Return the lowercased runs of letters and digits of a text."""
    return WORD.findall(text.lower())


def deduplicate(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Keep the first of prompts that say the same: equal but for white space and the case of letters."""
    first: dict[tuple[str, ...], Prompt] = {}
    for prompt in prompts:
        first.setdefault(_said(prompt), prompt)
    return list(first.values())


def filter_contaminated(
    prompts: Sequence[Prompt], *, heldout: Iterable[Prompt], ngram_words: int = 10
) -> tuple[list[Prompt], ContaminationReport]:
    """Drop training prompts that repeat one another or overlap with any held-out prompt.

    A prompt overlaps when one of its turns shares `ngram_words` consecutive words with a held-out turn, whatever the
    case and punctuation between them; a held-out turn shorter than that overlaps with a turn of exactly its words.

    Args:
        prompts: training prompts, in order of preference.
        heldout: every held-out prompt there is, including those a limit leaves out of this run.
        ngram_words: length of a run, in words.

    Returns:
        The prompts that are left, in their order, and the counts per source.
    """
    if ngram_words < 1:
        raise ValueError(f"ngram_words is {ngram_words}: use at least one word (10 is usual)")
    known = {run for prompt in heldout for turn in prompt.turns for run in _runs(turn, ngram_words)}
    report = ContaminationReport(ngram_words)
    seen: set[tuple[str, ...]] = set()
    kept: list[Prompt] = []
    for prompt in prompts:
        counts = report.sources.setdefault(prompt.source, SourceCounts())
        counts.loaded += 1
        said = _said(prompt)
        if said in seen:
            counts.duplicates += 1
        elif any(run in known for turn in prompt.turns for run in _runs(turn, ngram_words)):
            counts.contaminated += 1
            report.contaminated_ids.append(prompt.id)
        else:
            counts.kept += 1
            kept.append(prompt)
        seen.add(said)
    return kept, report


def _said(prompt: Prompt) -> tuple[str, ...]:
    """Return what makes two prompts the same. Punctuation counts: in code and maths it carries the meaning."""
    return tuple(" ".join(text.casefold().split()) for text in (prompt.system or "", *prompt.turns))


def _runs(turn: str, length: int) -> Iterator[bytes]:
    """Yield a hash of every run of `length` words; a shorter turn is one run, which only its own words can equal."""
    spoken = words(turn)
    for start in range(max(len(spoken) - length + 1, min(len(spoken), 1))):
        run = " ".join(spoken[start : start + length])
        yield hashlib.blake2b(run.encode(), digest_size=12).digest()
