"""Prompts like those of another source: the target gets the beginning of one and writes how it goes on.

A few hundred prompts of one kind become thousands that differ, for a draft to learn the kind rather than the prompts.
As with `magpie`, whose filters apply, the target answers them like any other.
"""

import random
from dataclasses import dataclass, replace

from distill.prompts import Prompt, SourceConfig, SourceContext, choose, magpie, rank
from inference.errors import InputError


@dataclass
class Config(magpie.Config):
    """User turns that begin like those of `like`."""

    kind: str = "similar"
    domain: str = ""
    """Of the prompts (empty = that of the other source)."""
    like: str = ""
    """Name of the other source, one to train on: every turn begins like the first turn of one of its prompts."""
    least_share: float = 0.1
    """Shortest beginning, as a share of the other turn's tokens; at least one token stands."""
    most_share: float = 0.4
    """Longest beginning, likewise; how long each is lies between the two by chance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.least_share <= self.most_share < 1:
            raise ValueError(
                f"{self.kind}: beginnings of {self.least_share} to {self.most_share}: use 0 <= least <= most < 1"
            )
        if self.heldout:
            raise ValueError(f"{self.kind}: heldout is true, but what is made from training prompts is to train on")

    def read(self, context: SourceContext) -> list[Prompt]:
        """See `distill.prompts.magpie.Config.read`.

        Raises:
            InputError: also where there is no other source, it is held out, or of this kind.
        """
        domain = self.domain or self._other(context).domain
        return [replace(prompt, domain=domain) for prompt in super().read(context)]

    def beginnings(self, context: SourceContext) -> magpie.Beginnings:
        """See `distill.prompts.magpie.Config.beginnings`: prompts by turns, in an order of the seed.

        Raises:
            InputError: all of the other source's prompts are longer than `max_chars`.
        """
        other = self._other(context)
        chosen = choose(context.prompts_of(self.like), limit=other.limit, seed=context.seed)
        prompts = [prompt for prompt in chosen if len(prompt.turns[0]) <= self.max_chars]
        if not prompts:
            raise InputError(
                f"every prompt of {self.like} is longer than {self.max_chars} characters",
                where=f"prompts (kind {self.kind})",
                mend="raise max_chars",
            )
        prompts.sort(key=lambda prompt: rank(prompt.id, seed=context.seed))
        turns = context.tokenizer([prompt.turns[0] for prompt in prompts], add_special_tokens=False)["input_ids"]
        before = super().beginnings(context)

        def begun(number: int) -> tuple[list[int], list[int]]:
            share = random.Random(f"{context.seed}/{number}").uniform(self.least_share, self.most_share)
            turn = turns[number % len(turns)]
            return before(number)[0], turn[: max(1, int(share * len(turn)))]

        return begun

    def _other(self, context: SourceContext) -> SourceConfig:
        """The source named by `like`."""
        source = context.sources.get(self.like)
        if source is not None and not source.heldout and source.kind != self.kind:
            return source
        fault = "there is none" if source is None else "it is held out" if source.heldout else f"it is {self.kind} too"
        names = [name for name, one in context.sources.items() if not one.heldout and one.kind != self.kind]
        raise InputError(
            f"prompts like those of source {self.like!r}, but {fault}",
            where=f"prompts (kind {self.kind})",
            mend=f"name one to train on: {', '.join(names) or 'the run has none'}",
        )
