"""A network that reads the target's features as the draft: EAGLE-3, DFlash, DSpark and whatever is added to them.

Features arrive from the decoder for tokens that are verified, so nothing is ever taken back: the context only grows,
and a block leaves no trace.
"""

import torch

from inference.drafters import LoadContext, Proposal
from inference.drafters._token import draw_token
from inference.feature_drafts import FeatureNetwork
from inference.feature_drafts._checkpoint import load_network
from inference.lookahead import Lookahead, Signals, Visible
from inference.precision import model_nbytes
from inference.randomness import Source
from inference.sampling import SamplingSettings


class FeatureDrafter:
    """Drives a feature network through rounds.

    Confidence of a position is the network's own head where it has one, else the largest probability of the row.

    Attributes:
        taps: target layers whose outputs `read` is given.
    """

    kind = "feature"

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.taps = tuple(network.taps)
        self._cache = network.new_cache()
        self._unread: list[torch.Tensor] = []

    def begin(self, prompt: torch.Tensor) -> None:
        """Forget the last request."""
        self._cache.clear()
        self._unread.clear()

    def read(self, features: torch.Tensor) -> None:
        """Features `[n, m * D]` of tokens that were just verified; projected when a block is next asked for."""
        self._unread.append(features)

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`. The whole trained block is computed whatever the limit; its first slots are used."""
        tokens = context[:0]
        limit = min(limit, self.network.block)
        # A prompt of one token leaves nothing to read.
        if limit < 1 or context.shape[0] < 2:
            return Proposal(tokens)
        self._catch_up(context)
        block = self.network.begin_block(context[-1], self._cache)
        rows: list[torch.Tensor] = []
        siblings: list[torch.Tensor] = []
        signals: tuple[Signals, ...] = ()
        previous = context[-1]
        while tokens.shape[0] < limit:
            position = tokens.shape[0] + 1
            if not lookahead.reads and not lookahead.keeps(Visible(position)):
                break
            step = self.network.step(block, position - 1, previous, confidence="confidence" in lookahead.reads)
            drawn = draw_token(
                self._over_the_vocabulary(step.logits)[None],
                context,
                tokens,
                settings=settings,
                generator=generator,
                lookahead=lookahead,
                so_far=signals,
                confidence=step.confidence,
            )
            if drawn is None:
                break
            previous, signals = drawn.token, drawn.signals
            tokens = torch.cat([tokens, previous[None]])
            siblings.append(drawn.siblings)
            if drawn.row is not None:
                rows.append(drawn.row)
        return Proposal.of(tokens, rows, siblings)

    def rollback(self, num_accepted: int) -> None:
        """Nothing to take back: a block is never written into the context."""

    def nbytes(self) -> int:
        """See `Drafter.nbytes`; the target's embedding and head are borrowed and not counted."""
        return model_nbytes(self.network) + self._cache.nbytes()

    def _catch_up(self, context: torch.Tensor) -> None:
        """Project the features that came since the last block."""
        if self._unread:
            features = torch.cat(self._unread) if len(self._unread) > 1 else self._unread[0]
            start = self._cache.length
            self.network.read(features, context[start + 1 : start + 1 + features.shape[0]], self._cache)
            self._unread.clear()

    def _over_the_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over the target's vocabulary, `[V]`; what the draft cannot propose is -inf."""
        ids = self.network.vocabulary
        if ids is None:
            return logits
        spread = logits.new_full((self.network.shape.vocab,), -torch.inf)
        return spread.index_copy_(0, ids, logits)


def load(spec: dict[str, object], context: LoadContext) -> FeatureDrafter:
    """See `load_drafter`."""
    return FeatureDrafter(load_network(context.folder, context.target, precision=context.precision))
