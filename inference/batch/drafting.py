"""Drafts of all running requests, one for each slot of the engine: together where the draft can, else one by one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from inference.batch.contexts import DraftSlots
from inference.drafters import Ask, Drafter, Proposal, ReadsFeatures
from inference.drafters.feature import FeatureDrafter, propose_blocks
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import MixedDrafter, Turns, draft_limit
from inference.feature_networks import FeatureNetwork
from inference.precision import model_nbytes

_Item = TypeVar("_Item")


class DraftGroup(Protocol):
    """Drafts for the requests in slots 0, 1, ...

    Attributes:
        taps: target layers whose outputs `read` is given; none for drafts that read tokens alone.
    """

    @property
    def taps(self) -> tuple[int, ...]: ...

    def join(self, prompt: Tensor) -> None:
        """A request takes the next slot; `prompt` is int64 `[T]`."""
        ...

    def leave(self, slot: int) -> None:
        """A request has ended; the one in the last slot moves into its place."""
        ...

    def read(self, slot: int, features: Tensor) -> None:
        """Features `[n, m * D]` of a request's tokens that were just verified; see `ReadsFeatures.read`."""
        ...

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        """A block for each request, in the order of slots; one with a limit below 1 gets none."""
        ...

    def rollback(self, num_accepted: Sequence[int]) -> None:
        """Told after verification how many tokens of each block stand."""
        ...

    def nbytes(self) -> int:
        """Bytes of weights and caches beyond the target's own."""
        ...


def draft_group(make: Callable[[], Drafter], *, max_requests: int, max_tokens: int) -> DraftGroup:
    """Group the drafts that `make` gives one of.

    Args:
        make: a drafter for one request; what they make may share weights.
        max_requests: most slots.
        max_tokens: most positions of a request.
    """
    example = make()

    def together(network: FeatureNetwork) -> FeatureGroup:
        return FeatureGroup(network, max_requests=max_requests, max_tokens=max_tokens + network.block)

    if isinstance(example, FeatureDrafter):
        return together(example.network)
    if isinstance(example, MixedDrafter) and isinstance(example.draft, FeatureDrafter):
        return MixedGroup(example, together(example.draft.network))
    return OneByOne(make, example)


class OneByOne:
    """Drafters of one request each, asked in turn."""

    def __init__(self, make: Callable[[], Drafter], example: Drafter) -> None:
        self._make = make
        self.taps = example.taps if isinstance(example, ReadsFeatures) else ()
        self._drafters: list[Drafter] = []  # by slot
        self._spare = [example]

    def join(self, prompt: Tensor) -> None:
        """See `DraftGroup.join`; a drafter that has served before serves again."""
        self._drafters.append(self._spare.pop() if self._spare else self._make())
        self._drafters[-1].begin(prompt)

    def leave(self, slot: int) -> None:
        """See `DraftGroup.leave`."""
        self._spare.append(_take_out(self._drafters, slot))

    def read(self, slot: int, features: Tensor) -> None:
        """See `DraftGroup.read`."""
        drafter = self._drafters[slot]
        assert isinstance(drafter, ReadsFeatures), "only drafts with taps are given features"
        drafter.read(features)

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        """See `DraftGroup.propose`."""
        return [
            drafter.propose(
                ask.context,
                limit=ask.limit,
                lookahead=ask.lookahead,
                settings=ask.settings,
                generator=ask.generator,
            )
            for drafter, ask in zip(self._drafters, asks, strict=True)
        ]

    def rollback(self, num_accepted: Sequence[int]) -> None:
        """See `DraftGroup.rollback`."""
        for drafter, stood in zip(self._drafters, num_accepted, strict=True):
            drafter.rollback(stood)

    def nbytes(self) -> int:
        """See `DraftGroup.nbytes`; weights that drafters share are counted for each."""
        return sum(drafter.nbytes() for drafter in (*self._drafters, *self._spare))


class FeatureGroup:
    """A feature network that drafts for all requests in the same passes."""

    def __init__(self, network: FeatureNetwork, *, max_requests: int, max_tokens: int) -> None:
        self.network = network
        self.taps = tuple(network.taps)
        self._contexts = DraftSlots(network.cached_layers, max_slots=max_requests, max_tokens=max_tokens)
        self._unread: list[list[Tensor]] = []  # by slot

    def join(self, prompt: Tensor) -> None:
        """See `DraftGroup.join`."""
        self._contexts.join()
        self._unread.append([])

    def leave(self, slot: int) -> None:
        """See `DraftGroup.leave`."""
        self._contexts.leave(slot)
        _take_out(self._unread, slot)

    def read(self, slot: int, features: Tensor) -> None:
        """See `DraftGroup.read`; projected when a block is next asked for."""
        self._unread[slot].append(features)

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        """See `DraftGroup.propose`."""
        # A prompt of one token leaves nothing to read.
        drafting = [slot for slot, ask in enumerate(asks) if ask.limit >= 1 and ask.context.shape[0] >= 2]
        proposals = [Proposal(ask.context[:0]) for ask in asks]
        if not drafting:
            return proposals
        self._catch_up(drafting, asks)
        with self._contexts.drafting(drafting):
            drafted = propose_blocks(self.network, self._contexts, [asks[slot] for slot in drafting])
        for slot, proposal in zip(drafting, drafted, strict=True):
            proposals[slot] = proposal
        return proposals

    def rollback(self, num_accepted: Sequence[int]) -> None:
        """Nothing to take back: a block is never part of a context."""

    def nbytes(self) -> int:
        """See `DraftGroup.nbytes`."""
        return model_nbytes(self.network) + self._contexts.nbytes()

    def _catch_up(self, slots: Sequence[int], asks: Sequence[Ask]) -> None:
        """Project, for these requests at once, the features that came since their last blocks."""
        behind = [slot for slot in slots if self._unread[slot]]
        if not behind:
            return
        pieces = [piece for slot in behind for piece in self._unread[slot]]
        widths = [sum(piece.shape[0] for piece in self._unread[slot]) for slot in behind]
        held = self._contexts.held
        following = [asks[slot].context[held[slot] + 1 :][:width] for slot, width in zip(behind, widths, strict=True)]
        features = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        with self._contexts.reading(behind, widths, features.device):
            self.network.read(features, torch.cat(following), self._contexts)
        for slot in behind:
            self._unread[slot].clear()


class MixedGroup:
    """Look-up in front of a feature draft: each request by itself decides whose turn it is."""

    def __init__(self, example: MixedDrafter, group: FeatureGroup) -> None:
        self._settings, self._draft_tokens = example.lookup.settings, example.draft_tokens
        self._group = group
        self.taps = group.taps
        self._turns: list[Turns] = []  # by slot

    def join(self, prompt: Tensor) -> None:
        """See `DraftGroup.join`."""
        turns = Turns(LookupDrafter(self._settings))
        turns.begin(prompt)
        self._turns.append(turns)
        self._group.join(prompt)

    def leave(self, slot: int) -> None:
        """See `DraftGroup.leave`."""
        _take_out(self._turns, slot)
        self._group.leave(slot)

    def read(self, slot: int, features: Tensor) -> None:
        """See `DraftGroup.read`."""
        self._group.read(slot, features)

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        """See `DraftGroup.propose`."""
        by_lookup = [turns.of_lookup(ask.context) for turns, ask in zip(self._turns, asks, strict=True)]
        limits = [
            0 if first else draft_limit(ask.limit, self._draft_tokens)
            for first, ask in zip(by_lookup, asks, strict=True)
        ]
        proposals = self._group.propose([replace(ask, limit=limit) for ask, limit in zip(asks, limits, strict=True)])
        for slot, (turns, ask) in enumerate(zip(self._turns, asks, strict=True)):
            if by_lookup[slot]:
                proposals[slot] = turns.lookup.propose(
                    ask.context,
                    limit=ask.limit,
                    lookahead=ask.lookahead,
                    settings=ask.settings,
                    generator=ask.generator,
                )
            else:
                turns.drafted(len(proposals[slot]), ask.context)
        return proposals

    def rollback(self, num_accepted: Sequence[int]) -> None:
        """Neither look-up nor the draft has anything to forget."""

    def nbytes(self) -> int:
        """See `DraftGroup.nbytes`."""
        return self._group.nbytes()


def _take_out(items: list[_Item], slot: int) -> _Item:
    """Remove what is in a slot, and let the last one move into its place."""
    taken, last = items[slot], items.pop()
    if slot < len(items):
        items[slot] = last
    return taken
