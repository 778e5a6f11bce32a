"""What a generator of responses may use, and the tokens it gives back. Not a generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distill.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from distill.corpus import Sample
    from inference.answers import Answering
    from inference.model import CausalModel


@dataclass(frozen=True)
class AnswerContext:
    """What answering needs.

    Attributes:
        tokenizer: the target's.
        stop_tokens: end a response.
        model: the target in its generation arithmetic; None for generators that do not run it here.
        taps: target layers whose features are kept along with the tokens; none for none.
        made: what a generator has made of the target, for the shards to come.
    """

    tokenizer: "PreTrainedTokenizerBase"
    stop_tokens: frozenset[int]
    model: "CausalModel | None"
    taps: Sequence[int] = ()
    made: "list[Answering]" = field(default_factory=list)

    def answering(self, make: "Callable[[AnswerContext], Answering]") -> "Answering":
        """What answers, made when first asked for."""
        if not self.made:
            self.made.append(make(self))
        return self.made[0]


def sample_of(
    prompt: Prompt,
    *,
    split: str,
    ids: Sequence[int],
    mask: Sequence[bool],
    states: "torch.Tensor | None",
    text: str,
    features: "torch.Tensor | None" = None,
) -> "Sample":
    """A corpus sample out of lists; see `distill.corpus.Sample`."""
    import torch

    from distill.corpus import Sample

    return Sample(
        id=prompt.id,
        domain=prompt.domain,
        source=prompt.source,
        split=split,
        tokens=torch.tensor(ids, dtype=torch.long),
        mask=torch.tensor(mask, dtype=torch.bool),
        states=states,
        text=text,
        features=features,
    )
