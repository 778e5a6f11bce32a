"""Everything that can propose tokens, behind one small protocol; one module per kind.

A drafter folder holds `draft.json` with a `kind`, and whatever that kind reads: nothing, or a Hugging Face model
folder. `load_drafter` looks the kind up among the modules of this package; a downloaded folder names no code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from inference.lookahead import Lookahead
from inference.model import CausalModel
from inference.pair_files import read_draft_spec
from inference.plugins import plugin
from inference.randomness import Source
from inference.sampling_settings import SamplingSettings


@dataclass(frozen=True)
class Proposal:
    """Tokens proposed after the anchor: a chain, and beside some of its tokens siblings that may stand in their place.

    A sibling is a leaf: the round ends after it, with the token that the target adds.

    Attributes:
        tokens: int64 `[l]`, the chain; l may be 0.
        probs: `[l, V]`, the very rows the tokens were sampled from; None when each token was certain (point mass).
        siblings: int64 `[w]`, position by position; those of one position in the order in which they were drawn from
            its row, without replacement, after the chain's own token. None for no siblings.
        slots: for each sibling the place in the chain, from 0, whose token it may replace; ascending.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None = None
    siblings: torch.Tensor | None = None
    slots: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def first(self, length: int) -> "Proposal":
        """The first `length` tokens of the chain, with what stands beside them."""
        if length >= len(self):
            return self
        slots = tuple(slot for slot in self.slots if slot < length)
        siblings = self.siblings[: len(slots)] if self.siblings is not None and slots else None
        return Proposal(self.tokens[:length], None if self.probs is None else self.probs[:length], siblings, slots)

    @classmethod
    def of(cls, tokens: torch.Tensor, rows: Sequence[torch.Tensor], siblings: Sequence[torch.Tensor]) -> "Proposal":
        """Put together what was drawn position by position: the rows, none if greedy, and each position's siblings."""
        slots = tuple(slot for slot, drawn in enumerate(siblings) for _ in range(drawn.shape[0]))
        return cls(
            tokens, torch.stack(list(rows)) if rows else None, torch.cat(list(siblings)) if slots else None, slots
        )


@dataclass(frozen=True)
class Ask:
    """What one request wants drafted in the coming round.

    Attributes:
        context: int64 `[T]`, all verified, its last token the anchor.
        limit: most tokens.
        lookahead: the request's policy.
        settings: how it samples.
        generator: source of its random decisions.
    """

    context: torch.Tensor
    limit: int
    lookahead: Lookahead
    settings: SamplingSettings
    generator: Source


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens for one request at a time.

    Attributes:
        kind: name of the module it comes from.
    """

    kind: str

    def begin(self, prompt: torch.Tensor) -> None:
        """Start a request; `prompt` is int64 `[T]`, its last token the first anchor. May prefill a cache."""
        ...

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """Propose at most `limit` tokens after `context`, int64 `[T]`, all verified, its last token the anchor."""
        ...

    def rollback(self, num_accepted: int) -> None:
        """Told after verification how many proposed tokens stand; forget what was rejected."""
        ...

    def nbytes(self) -> int:
        """Bytes of weights and caches held beyond the target's own."""
        ...


@runtime_checkable
class ReadsFeatures(Protocol):
    """What a drafter has besides when it reads the target's features.

    Attributes:
        taps: decoder layers of the target whose outputs it reads (see `inference.features`).
    """

    taps: tuple[int, ...]

    def read(self, features: torch.Tensor) -> None:
        """Given, in order, the features `[n, m * D]` of tokens as they are verified: all but the anchor's own."""
        ...


@dataclass(frozen=True)
class LoadContext:
    """What a kind may need besides its folder.

    Attributes:
        folder: the draft's folder.
        target_folder: folder of the target's weights and tokenizer.
        target: the loaded target, for drafts that share its parts.
        precision: arithmetic for a draft model (see `inference.precision`).
        device: where it runs.
    """

    folder: Path
    target_folder: Path
    target: CausalModel
    precision: str
    device: torch.device


def load_drafter(context: LoadContext) -> Drafter:
    """Build the drafter a folder describes.

    Raises:
        InputError: unknown kind, or files that are missing, truncated or do not fit the target.
    """
    spec = read_draft_spec(context.folder)
    drafter: Drafter = plugin("inference.drafters", str(spec["kind"])).load(spec, context)
    return drafter
