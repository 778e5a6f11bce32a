"""Prompts the target writes itself: given the chat template up to the user's first word, it writes a user's turn.

Not a data set: what comes out depends on the target, on its numerics and on the seed. Only the user's turn is taken;
the corpus stage has the target answer it like any other prompt. Method: Magpie, Xu et al. 2024 (arXiv 2406.08464).
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from distill.chat import template_markers, user_prefix
from distill.contamination import words
from distill.prompts import Prompt, SourceConfig, SourceContext
from inference.errors import InputError

log = logging.getLogger(__name__)

Beginnings = Callable[[int], tuple[list[int], list[int]]]
"""The number of a turn to what stands before it and what of itself stands already, both in tokens."""
MIN_DISTINCT_SHARE = 0.5  # of four-word runs; prose stays above 0.9, a loop falls fast
MAX_SAME_CHARACTERS = 12  # in a row; rules and indents of pasted text are shorter


@dataclass
class Config(SourceConfig):
    """User turns sampled from the target."""

    kind: str = "magpie"
    limit: int = 1000
    """How many prompts to keep; there is no "all", so -1 is refused."""
    system: str = ""
    """System message to write under and to answer under (empty = the chat template's default)."""
    topics: list[str] = field(default_factory=list)
    """System messages to write under alone, a batch under each by turns; turns are answered under `system`."""
    temperature: float = 0.9
    """Sampling temperature; low values repeat themselves."""
    max_new_tokens: int = 128
    """Longest turn, in tokens; a turn that does not end by itself is dropped."""
    batch_prompts: int = 32
    """Turns sampled in one call of the target."""
    max_attempts: int = 4
    """Give up after this many samples for each prompt wanted, and keep what there is."""
    min_chars: int = 15
    """Shortest turn kept, in characters."""
    max_chars: int = 1200
    """Longest turn kept, in characters."""
    min_ascii_share: float = 0.95
    """Least share of ASCII characters (0 = any language and script)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 1:
            raise ValueError(
                f"{self.kind}: limit is {self.limit}, but the target never stops writing: say how many prompts"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"{self.kind}: temperature is {self.temperature}: use one above 0, or every turn is the same"
            )
        if not 1 <= self.min_chars <= self.max_chars:
            raise ValueError(
                f"{self.kind}: {self.min_chars} to {self.max_chars} characters: use 1 <= min_chars <= max_chars"
            )
        if min(self.max_new_tokens, self.batch_prompts, self.max_attempts) < 1:
            raise ValueError(f"{self.kind}: max_new_tokens, batch_prompts and max_attempts must be at least 1")
        if not all(topic.strip() for topic in self.topics):
            raise ValueError(f"{self.kind}: a topic is empty: give each a system message, or leave topics empty")
        if not 0 <= self.min_ascii_share <= 1:
            raise ValueError(f"{self.kind}: min_ascii_share is {self.min_ascii_share}: use 0 to 1")

    def read(self, context: SourceContext) -> list[Prompt]:
        """Sample batches until `limit` turns pass the filters, or the attempts run out; log the counts.

        Raises:
            InputError: no target to sample from, no chat template, or no turn passed.
        """
        if context.sample is None:
            raise InputError(
                "no target to write prompts", where=f"prompts (kind {self.kind})", mend="run it in the corpus stage"
            )
        beginning = self.beginnings(context)
        markers = template_markers(context.tokenizer)
        kept: dict[str, str] = {}
        dropped: Counter[str] = Counter()
        tried = 0
        while len(kept) < self.limit and tried < self.max_attempts * self.limit:
            seed = (context.seed * 1_000_003 + tried) % 2**31  # one of its own for every batch
            begun = [beginning(tried + place) for place in range(self.batch_prompts)]
            asked = [prefix + opening for prefix, opening in begun]
            batch = context.sample(asked, self.max_new_tokens, self.temperature, seed)
            for (_, opening), ids in zip(begun, batch, strict=True):
                text = str(context.tokenizer.decode(opening + ids, skip_special_tokens=False)).strip()
                reason = "unfinished" if len(ids) >= self.max_new_tokens else self.fault(text, markers=markers)
                key = " ".join(words(text))
                reason = "duplicate" if not reason and key in kept else reason
                if reason:
                    dropped[reason] += 1
                else:
                    kept[key] = text
            tried += len(batch)
        self._log(tried, kept=len(kept), dropped=dropped)
        return [
            Prompt(str(number), self.domain, self.kind, (text,), system=self.system or None, heldout=self.heldout)
            for number, text in enumerate(list(kept.values())[: self.limit])
        ]

    def beginnings(self, context: SourceContext) -> Beginnings:
        """How turns begin: each with its first word, behind a system message and the template's way to the user."""
        under: list[str | None] = [*self.topics] or [self.system or None]
        prefixes = [user_prefix(context.tokenizer, system=topic) for topic in under]
        return lambda number: (prefixes[number // self.batch_prompts % len(prefixes)], [])

    def fault(self, text: str, *, markers: tuple[str, ...]) -> str:
        """Return why a turn is dropped, in one word or two, or "" if it is good.

        Args:
            text: the decoded turn, special tokens included.
            markers: texts that only the chat template writes.
        """
        if not self.min_chars <= len(text) <= self.max_chars:
            return "length"
        if any(marker in text for marker in markers):
            return "template markers"
        if sum(character.isascii() for character in text) < self.min_ascii_share * len(text):
            return "language"
        if sum(character.isalpha() for character in text) < 0.5 * len(text):
            return "few letters"
        return "repetition" if repeats(text) else ""

    def _log(self, tried: int, *, kept: int, dropped: Counter[str]) -> None:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common()) or "none"
        log.info("%s: %d turns sampled, %d kept, dropped: %s", self.kind, tried, min(kept, self.limit), reasons)
        if not kept:
            raise InputError(
                f"none of {tried} turns the target wrote passed the filters (dropped: {reasons})",
                where=f"prompts (kind {self.kind})",
                mend="loosen the filters, or use another source: not every target can write a user's turn",
            )
        if kept < self.limit:
            said = (self.kind, kept, self.limit, tried)
            log.warning("%s: %d of %d prompts after %d samples; raise max_attempts for more", *said)


def repeats(text: str) -> bool:
    """Return whether a text is caught in a loop: the same line three times, one character over and over, or few
    distinct four-word runs."""
    lines = Counter(line.strip() for line in text.splitlines() if len(line.strip()) > 3)
    if lines and max(lines.values()) >= 3:
        return True
    if re.search(rf"(\S)\1{{{MAX_SAME_CHARACTERS - 1}}}", text):
        return True
    spoken = words(text)
    runs = [tuple(spoken[i : i + 4]) for i in range(len(spoken) - 3)]
    return len(runs) >= 8 and len(set(runs)) < MIN_DISTINCT_SHARE * len(runs)
