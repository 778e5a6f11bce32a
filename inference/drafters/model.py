"""A language model of its own as the draft: pruned and pretrained students, with their own key-value cache."""

import torch

from inference.cache import RollbackCache
from inference.drafters import LoadContext, Proposal
from inference.drafters._token import draw_token
from inference.loading import load_causal_model
from inference.lookahead import Lookahead, Signals, Visible
from inference.model import CausalModel
from inference.prescore.rehearsal import FixedResponse, Table, table_of_rows
from inference.prescore.rows import judged
from inference.randomness import Source
from inference.sampling_settings import SamplingSettings

# Rows as wide as the vocabulary that exist at one time when a response is rehearsed.
_ROWS = 128


class ModelDrafter:
    """Drafts token by token with a causal LM that reads tokens alone.

    The confidence of position k is the largest probability of the draft's own row for it, taken before sampling.
    """

    def __init__(self, model: CausalModel, *, kind: str = "model") -> None:
        self.model = model
        self.kind = kind
        self._cache = model.new_cache()
        self._valid = 0

    def begin(self, prompt: torch.Tensor) -> None:
        """Prefill all but the anchor, unless that is more than this model's context holds."""
        self._cache.rollback(0)
        if 1 < prompt.shape[0] <= self.model.context_limit:
            self.model.logits(prompt[:-1], self._cache, num_rows=1)
        self._valid = self._cache.length

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`."""
        self._context_length = context.shape[0]
        # The last proposed token is never fed. A draft may hold less context than the target; then it falls silent.
        limit = min(limit, self.model.context_limit - context.shape[0] + 1)
        pending = context[self._valid :]
        tokens = context[:0]
        rows: list[torch.Tensor] = []
        siblings: list[torch.Tensor] = []
        signals: tuple[Signals, ...] = ()
        while tokens.shape[0] < limit:
            position = tokens.shape[0] + 1
            if not lookahead.reads and not lookahead.keeps(Visible(position)):
                break
            logits = self.model.logits(pending, self._cache, num_rows=1)
            drawn = draw_token(
                logits, context, tokens, settings=settings, generator=generator, lookahead=lookahead, so_far=signals
            )
            if drawn is None:
                break
            tokens, signals = torch.cat([tokens, drawn.token[None]]), drawn.signals
            pending = tokens[-1:]
            siblings.append(drawn.siblings)
            if drawn.row is not None:
                rows.append(drawn.row)
        return Proposal.of(tokens, rows, siblings)

    def rollback(self, num_accepted: int) -> None:
        """Drop rejected tokens from the draft's cache; the last proposed token was never fed to it."""
        self._valid = min(self._cache.length, self._context_length + num_accepted)
        self._cache.rollback(self._valid)

    def nbytes(self) -> int:
        """See `Drafter.nbytes`."""
        return self.model.nbytes() + self._cache.nbytes()

    @torch.inference_mode()
    def rehearse(self, response: FixedResponse, *, longest: int) -> Table:
        """See `Rehearses.rehearse`. A row depends on the tokens before it alone: one reading gives every block's."""
        room, first, length = self.model.context_limit, response.first, response.num_tokens
        chances = torch.zeros(length, dtype=torch.float64)
        ranks = torch.full((length,), -1) if response.settings.greedy else None
        fed = response.tokens[: min(first + length - 1, room)].to(self.model.device)
        cache = self.model.new_cache()
        if 1 < first <= fed.shape[0]:
            self.model.logits(fed[: first - 1], cache, num_rows=1)
        for start in range(0, fed.shape[0] - first + 1, _ROWS):
            piece = fed[first - 1 + start : first - 1 + start + _ROWS]
            rows = judged(self.model.logits(piece, cache, num_rows=piece.shape[0]), response, start=start)
            chances[start : start + piece.shape[0]] = rows.chances
            if ranks is not None and rows.ranks is not None:
                ranks[start : start + piece.shape[0]] = rows.ranks
        proposed = [max(0, min(longest, room - (first + anchor) + 1)) for anchor in range(length)]
        return table_of_rows(chances, ranks, proposed=proposed, budget=response.budget)

    @property
    def cache(self) -> RollbackCache:
        """The draft's own cache."""
        return self._cache


def load(spec: dict[str, object], context: LoadContext) -> ModelDrafter:
    """See `load_drafter`."""
    model = load_causal_model(context.folder, precision=context.precision, device=context.device)
    context.target.check_same_vocabulary(model, where=str(context.folder))
    return ModelDrafter(model)
