"""Where prompts come from: one module per kind of source, each with a `Config` that reads prompts and nothing else.

A source yields what users say, never what anybody answered: answers in the data are dropped, because a draft learns
from the target's own responses. Sources neither split nor clean: `distill.splits` and `distill.contamination` do that.

A new source is one module here with a dataclass `Config(SourceConfig)` whose `kind` is the module's name and which
implements `read`, one YAML file in `conf/prompts/`, and one test.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "SourceConfig", "SourceContext", "choose"]


@dataclass(frozen=True)
class Prompt:
    """What one user says to the target, before anything is answered."""

    id: str
    """Unique name, stable between runs; `distill.splits` puts the source's name in front of it."""
    domain: str
    """`chat`, `code`, `maths` or any other word; scores are reported per domain."""
    source: str
    """Name of the source it came from."""
    turns: tuple[str, ...]
    """The user's turns in order; the target answers each before the next is asked."""
    system: str | None = None
    """System message, or None for the chat template's own default."""
    heldout: bool = False
    """True: only ever scored, never trained on."""

    def __post_init__(self) -> None:
        if not self.turns or not all(turn.strip() for turn in self.turns):
            raise ValueError(f"prompt {self.id!r} has no text: give it at least one turn, none of them empty")


@dataclass(frozen=True)
class SourceContext:
    """What a source may use besides its own settings."""

    tokenizer: "PreTrainedTokenizerBase"
    """The target's tokenizer."""
    seed: int
    """Decides subsampling and, for written prompts, sampling."""
    sample: Callable[[list[list[int]], int, float, int], list[list[int]]] | None = None
    """The target writing: (prompt_ids, max_new_tokens, temperature, seed) -> new token ids per prompt, stop token
    stripped. Only `magpie` and `similar` need it; None when no target is loaded."""
    sources: Mapping[str, "SourceConfig"] = field(default_factory=dict)
    """All sources of the run by name, for one that begins with what another reads."""
    _read: dict[str, list[Prompt]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prompts_of(self, name: str) -> list[Prompt]:
        """What one of the sources reads, whatever its `limit`; read once, whoever asks: some are written by the target.

        Raises:
            InputError: see `SourceConfig.read`.
        """
        if name not in self._read:
            self._read[name] = self.sources[name].read(self)
        return self._read[name]


@dataclass
class SourceConfig:
    """Settings every source has. A source inherits them, names its `kind` and implements `read`."""

    kind: str = ""
    """Name of the plug-in module."""
    domain: str = "chat"
    """Domain given to every prompt of this source: chat, code, maths, or a word of your own."""
    heldout: bool = False
    """True: scored, never trained on; training prompts that overlap with it are dropped."""
    limit: int = -1
    """How many prompts to keep, chosen by the seed (-1 = all). A smaller limit is a subset of a larger one."""
    answers: int = 0
    """Most answers to one of its training prompts (0 = `corpus.answers`)."""

    def __post_init__(self) -> None:
        if self.answers < 0:
            raise ValueError(f"{self.kind}: answers is {self.answers}: use 0 for that of the corpus, or 1 and more")
        if self.limit != -1 and self.limit < 1:
            raise ValueError(f"{self.kind}: limit is {self.limit}: use a positive number, or -1 for all")

    def read(self, context: SourceContext) -> list[Prompt]:
        """Return every prompt of the source, in a fixed order, whatever `limit` says.

        Raises:
            InputError: the source is missing, empty or malformed.
        """
        raise NotImplementedError(f"{type(self).__module__} does not implement read()")

    def load(self, context: SourceContext) -> list[Prompt]:
        """Return at most `limit` prompts of the source, in the source's order."""
        return choose(self.read(context), limit=self.limit, seed=context.seed)


def choose(prompts: list[Prompt], *, limit: int, seed: int) -> list[Prompt]:
    """Keep `limit` prompts (-1 = all), the same ones for the same ids and seed, in the order given.

    Each id is ranked by a hash of seed and id, so the choice does not depend on the order, on the Python version or on
    other prompts: a smaller limit always keeps a subset of what a larger one keeps.
    """
    if limit == -1 or len(prompts) <= limit:
        return prompts
    ranked = sorted(range(len(prompts)), key=lambda i: rank(prompts[i].id, seed=seed))
    return [prompts[i] for i in sorted(ranked[:limit])]


def rank(name: str, *, seed: int) -> bytes:
    """Return a hash that puts names into a random but reproducible order."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
