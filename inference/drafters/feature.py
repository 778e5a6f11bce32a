"""A network that reads the target's features as the draft: EAGLE-3, DFlash, DSpark and whatever is added to them.

Features arrive from the decoder for tokens that are verified, so nothing is ever taken back: the context only grows,
and a block leaves no trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.drafters import Ask, LoadContext, Proposal
from inference.drafters._token import draw_token, plain, row_signals
from inference.feature_networks import FeatureNetwork, PackedBatch, Step
from inference.feature_networks._checkpoint import load_network
from inference.feature_networks._contexts import DraftContext
from inference.lookahead import Lookahead, Signals, Visible
from inference.precision import model_nbytes
from inference.prescore.rehearsal import FixedResponse, Table
from inference.prescore.rows import judged
from inference.randomness import Source
from inference.sampling_settings import SamplingSettings

# Blocks that see each other's keys, and mask them, in one pass over a rehearsed response.
_ANCHORS = 64


class FeatureDrafter:
    """Drives a feature network through the rounds of one request.

    Confidence of a position is the network's own head where it has one, else the largest probability of the row.

    Attributes:
        network: may be shared by drafters.
        taps: target layers whose outputs `read` is given.
    """

    kind = "feature"

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.taps = tuple(network.taps)
        self._cache = network.new_cache()
        self._unread: list[Tensor] = []

    def begin(self, prompt: Tensor) -> None:
        """Forget the last request."""
        self._cache.clear()
        self._unread.clear()

    def read(self, features: Tensor) -> None:
        """Features `[n, m * D]` of tokens that were just verified; projected when a block is next asked for."""
        self._unread.append(features)

    def propose(
        self, context: Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`. The whole trained block is computed whatever the limit; its first slots are used."""
        # A prompt of one token leaves nothing to read.
        if limit < 1 or context.shape[0] < 2:
            return Proposal(context[:0])
        self._catch_up(context)
        ask = Ask(context, limit, lookahead, settings, generator)
        return propose_blocks(self.network, self._cache, [ask])[0]

    def rollback(self, num_accepted: int) -> None:
        """Nothing to take back: a block is never written into the context."""

    def nbytes(self) -> int:
        """See `Drafter.nbytes`; the target's embedding and head are borrowed and not counted."""
        return model_nbytes(self.network) + self._cache.nbytes()

    def rehearse(self, response: FixedResponse, *, longest: int) -> Table:
        """See `Rehearses.rehearse`: the blocks of all anchors in few passes, as in training."""
        length, block = response.num_tokens, min(longest, self.network.block)
        chances, ranks = self._judged(response, block)
        start = _first_anchor(response)
        proposed = [block if anchor >= start else 0 for anchor in range(length)]
        return Table(chances=chances, proposed=proposed, budget=response.budget, ranks=ranks)

    def continuation_ranks(self, response: FixedResponse, *, depth: int) -> Tensor:
        """Of every anchor of a greedy response, ranks of the tokens after it in the rows a tree's nodes come from.

        Args:
            response: of temperature 0.
            depth: tokens after each anchor, at most `FeatureNetwork.deepest`.

        Returns:
            int64 `[n, depth]`; see `Table.ranks`.
        """
        _, ranks = self._judged(response, min(depth, self.network.deepest))
        if ranks is None:
            raise ValueError("only greedy responses have ranks")
        return ranks

    @torch.inference_mode()
    def _judged(self, response: FixedResponse, slots: int) -> tuple[Tensor, Tensor | None]:
        """Chances and ranks of `Table` for the first so many slots."""
        length = response.num_tokens
        chances = torch.zeros(length, slots, dtype=torch.float64)
        ranks = torch.full((length, slots), -1) if response.settings.greedy else None
        for begin in range(_first_anchor(response), length, _ANCHORS):
            count = min(_ANCHORS, length - begin)
            states = _teacher_forced(self.network, response, begin, count, slots)
            for slot in range(slots):
                there = min(count, length - begin - slot)
                if there < 1:
                    break
                rows = judged(
                    self.network.head(states[:there, slot]),
                    response,
                    start=begin + slot,
                    vocabulary=self.network.vocabulary,
                )
                chances[begin : begin + there, slot] = rows.chances
                if ranks is not None and rows.ranks is not None:
                    ranks[begin : begin + there, slot] = rows.ranks
        return chances, ranks

    def _catch_up(self, context: Tensor) -> None:
        """Project the features that came since the last block."""
        if self._unread:
            features = torch.cat(self._unread) if len(self._unread) > 1 else self._unread[0]
            start = self._cache.length
            self.network.read(features, context[start + 1 : start + 1 + features.shape[0]], self._cache)
            self._unread.clear()


def _first_anchor(response: FixedResponse) -> int:
    """Of those that something is proposed at: a prompt of one token leaves nothing to read before the first round."""
    return 1 if response.first == 1 else 0


def _teacher_forced(network: FeatureNetwork, response: FixedResponse, begin: int, count: int, length: int) -> Tensor:
    """States of the first `length` slots `[count, length, S]` of the blocks at anchors `begin`, `begin + 1`, ... of a
    response."""
    parameter = next(network.parameters())
    tokens = response.tokens[None, :-1].to(parameter.device)
    anchors = torch.arange(count, device=parameter.device)[None] + (response.first + begin - 1)
    batch = PackedBatch(
        tokens=tokens,
        segments=torch.zeros_like(tokens),
        positions=torch.arange(tokens.shape[1], device=parameter.device)[None],
        features=response.features_of(network.taps)[None].to(parameter.device, parameter.dtype),
        anchors=anchors,
        slots=torch.ones(1, count, length, dtype=torch.bool, device=parameter.device),
    )
    return network.first_slot_states(batch, length)[0]


def propose_blocks(network: FeatureNetwork, cache: DraftContext, asks: Sequence[Ask]) -> list[Proposal]:
    """Draft the blocks of requests that have each read something, slot by slot, all requests at once.

    A request's block does not depend on the others'; it ends where its policy or its limit says so, and the rest of its
    rows is computed for nothing.

    Args:
        network: of the draft.
        cache: contexts of the requests, in the same order.
        asks: what each wants, with a limit of at least 1.
    """
    blocks = [_Block(ask, min(ask.limit, network.block)) for ask in asks]
    anchors = torch.cat([ask.context[-1:] for ask in asks]) if len(asks) > 1 else asks[0].context[-1:]
    wants_confidence = any("confidence" in ask.lookahead.reads for ask in asks)
    shared = None
    previous = anchors
    for slot in range(max(block.limit for block in blocks)):
        going = [(row, block) for row, block in enumerate(blocks) if block.goes_on(slot)]
        if not going:
            break
        shared = network.begin_block(anchors, cache) if shared is None else shared
        step = network.step(shared, slot, previous, confidence=wants_confidence)
        previous = _draw_slot(network, step, slot, going, previous)
    return [block.proposal() for block in blocks]


@dataclass(eq=False)
class _Block:
    """One request's block while it is drafted.

    Attributes:
        ask: what it wants.
        limit: longest block.
        tokens: int64 `[]` each.
        rows: `[V]` each, of sampled tokens.
        siblings: by position.
        signals: of the positions that were asked for.
        ended: whether the policy has ended it.
    """

    ask: Ask
    limit: int
    tokens: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    siblings: list[Tensor] = field(default_factory=list)
    signals: tuple[Signals, ...] = ()
    ended: bool = False

    def goes_on(self, slot: int) -> bool:
        """Whether this slot is to be computed; policies that read nothing are asked here."""
        policy = self.ask.lookahead
        if not self.ended and (slot >= self.limit or not (policy.reads or policy.keeps(Visible(slot + 1)))):
            self.ended = True
        return not self.ended

    def admits(self, slot: int, signals: Signals) -> bool:
        """Ask a policy that reads signals."""
        self.signals = (*self.signals, signals)
        self.ended = not self.ask.lookahead.keeps(Visible(slot + 1, self.signals))
        return not self.ended

    def add(self, token: Tensor, row: Tensor | None, siblings: Tensor | None = None) -> None:
        """One token more, the row it was sampled from, and its siblings."""
        self.tokens.append(token)
        self.siblings.append(self.ask.context[:0] if siblings is None else siblings)
        if row is not None:
            self.rows.append(row)

    def proposal(self) -> Proposal:
        """What was drafted."""
        tokens = torch.stack(self.tokens) if self.tokens else self.ask.context[:0]
        return Proposal.of(tokens, self.rows, self.siblings)


def _draw_slot(
    network: FeatureNetwork, step: Step, slot: int, going: Sequence[tuple[int, _Block]], previous: Tensor
) -> Tensor:
    """Draw a token for each block that goes on, unless its policy ends it; int64 `[R]`, `previous` in other rows.

    What can be computed for all rows at once is: distributions, signals and greedy choices. A sampled token is drawn by
    its request's own source. Rows that need more than a temperature are processed one by one.
    """
    together = [
        (row, block) for row, block in going if plain(block.ask.settings) and not _num_siblings(block.ask, slot)
    ]
    drawn = _draw_together(network, step, slot, together) if together else {}
    at_once = {row for row, _ in together}
    for row, block in going:
        if row not in at_once:
            token = _draw_alone(network, step, row, block)
            if token is not None:
                drawn[row] = token
    if len(drawn) == previous.shape[0]:
        return torch.stack([drawn[row] for row in range(len(drawn))])
    return torch.stack([drawn.get(row, previous[row]) for row in range(previous.shape[0])])


def _draw_together(
    network: FeatureNetwork, step: Step, slot: int, going: Sequence[tuple[int, _Block]]
) -> dict[int, Tensor]:
    """The tokens of blocks whose rows need a temperature and no more, by row."""
    asks = [block.ask for _, block in going]
    whole = len(going) == step.logits.shape[0]
    index = None if whole else torch.tensor([row for row, _ in going], device=step.logits.device)
    logits = step.logits if index is None else step.logits[index]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    sampled = [not ask.settings.greedy for ask in asks]
    if any(sampled):
        temperatures = [ask.settings.temperature or 1.0 for ask in asks]
        logits = logits / logits.new_tensor(temperatures)[:, None]
    reads = frozenset().union(*(ask.lookahead.reads for ask in asks))
    probs = torch.softmax(logits, dim=-1) if any(sampled) or reads - {"margin"} else None
    if reads:
        confidence = step.confidence if step.confidence is None or index is None else step.confidence[index]
        signals = row_signals(logits, probs, confidence, reads=reads)
        kept = [not ask.lookahead.reads or going[i][1].admits(slot, signals[i]) for i, ask in enumerate(asks)]
    else:
        kept = [True] * len(asks)
    best = None if all(sampled) else _target_ids(network, logits.argmax(dim=-1))
    found: dict[int, Tensor] = {}
    for i, (row, block) in enumerate(going):
        if not kept[i]:
            continue
        if sampled[i]:
            assert probs is not None, "sampling needs the distribution"
            token = _target_ids(network, block.ask.generator.categorical(probs[i]))
            block.add(token, _over_the_vocabulary(network, probs[i], 0.0))
        else:
            assert best is not None, "a greedy row has a best token"
            token = best[i]
            block.add(token, None)
        found[row] = token
    return found


def _draw_alone(network: FeatureNetwork, step: Step, row: int, block: _Block) -> Tensor | None:
    """The token of one block by the general rules, None when its policy ends it."""
    ask = block.ask
    drawn = draw_token(
        _over_the_vocabulary(network, step.logits[row], -torch.inf)[None],
        ask.context,
        torch.stack(block.tokens) if block.tokens else ask.context[:0],
        settings=ask.settings,
        generator=ask.generator,
        lookahead=ask.lookahead,
        so_far=block.signals,
        confidence=None if step.confidence is None else step.confidence[row],
    )
    if drawn is None:
        block.ended = True
        return None
    block.signals = drawn.signals
    block.add(drawn.token, drawn.row, drawn.siblings)
    return drawn.token


def _num_siblings(ask: Ask, slot: int) -> int:
    """Tokens wanted beside the one of this slot."""
    beside = ask.lookahead.siblings
    return beside[slot] if slot < len(beside) else 0


def _target_ids(network: FeatureNetwork, indices: Tensor) -> Tensor:
    """The target's ids of tokens of the draft's vocabulary."""
    return indices if network.vocabulary is None else network.vocabulary[indices]


def _over_the_vocabulary(network: FeatureNetwork, row: Tensor, outside: float) -> Tensor:
    """A row `[Vd]` over the target's vocabulary, `[V]`; what the draft cannot propose has the value `outside`."""
    if network.vocabulary is None:
        return row
    spread = row.new_full((network.shape.vocab,), outside)
    return spread.index_copy_(0, network.vocabulary, row)


def load(spec: dict[str, object], context: LoadContext) -> FeatureDrafter:
    """See `load_drafter`."""
    return FeatureDrafter(load_network(context.folder, context.target, precision=context.precision))
