"""One conversation in tokens: what a draft learns from, whether it is in memory or on disk. Not how it is kept.

`Conversation` is what every reader may ask for. A generator makes a `Sample`, which is one in memory; `distill.corpus`
hands out those on disk, which read themselves when they are asked. What needs no tokens is asked for by properties that
read none (`num_tokens`, `num_response_tokens`, `first_response`, `has_states`).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, overload

import torch


class Conversation(Protocol):
    """A conversation of T tokens."""

    @property
    def id(self) -> str:
        """Of the prompt."""
        ...

    @property
    def domain(self) -> str:
        """Of the prompt."""
        ...

    @property
    def source(self) -> str:
        """Of the prompt."""
        ...

    @property
    def split(self) -> str:
        """`train` or `validation`."""
        ...

    @property
    def tokens(self) -> torch.Tensor:
        """int64 `[T]`, template and responses."""
        ...

    @property
    def mask(self) -> torch.Tensor:
        """Bool `[T]`, true where the token is the assistant's own."""
        ...

    @property
    def states(self) -> torch.Tensor | None:
        """The target's head inputs that predicted tokens, or None: `[mask.sum(), D]` for the assistant's own,
        `[T - 1, D]` for all but the first, prompts included."""
        ...

    @property
    def text(self) -> str:
        """The last response as text, for people."""
        ...

    @property
    def has_states(self) -> bool:
        """Whether `states` is there."""
        ...

    @property
    def num_tokens(self) -> int:
        """T."""
        ...

    @property
    def num_response_tokens(self) -> int:
        """Tokens that are the assistant's own."""
        ...

    @property
    def first_response(self) -> int:
        """Position of the first token that is the assistant's own; T where none is."""
        ...

    @property
    def stated(self) -> torch.Tensor:
        """Bool `[T]`, true where `states` has the row that predicted the token."""
        ...

    def states_of(self, positions: torch.Tensor) -> torch.Tensor:
        """States `[positions.sum(), D]` that predicted some tokens.

        Args:
            positions: bool `[t]`, t up to T, true only where `stated` is.
        """
        ...


@dataclass(frozen=True)
class Sample:
    """A conversation in memory.

    Attributes:
        id: see `Conversation`, as all that follow.
        domain: of the prompt.
        source: of the prompt.
        split: `train` or `validation`.
        tokens: int64 `[T]`.
        mask: bool `[T]`.
        states: `[mask.sum(), D]` or `[T - 1, D]`, or None.
        text: the last response.
        features: `[T, m * D]`, target features as a generator kept them (see `distill.features`), or None; not read
            back with the rest.
    """

    id: str
    domain: str
    source: str
    split: str
    tokens: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor | None
    text: str
    features: torch.Tensor | None = None

    @property
    def has_states(self) -> bool:
        """See `Conversation`."""
        return self.states is not None

    @property
    def num_tokens(self) -> int:
        """See `Conversation`."""
        return self.tokens.shape[0]

    @property
    def num_response_tokens(self) -> int:
        """See `Conversation`."""
        return int(self.mask.sum())

    @property
    def first_response(self) -> int:
        """See `Conversation`."""
        return int(self.mask.long().argmax()) if bool(self.mask.any()) else self.num_tokens

    @property
    def stated(self) -> torch.Tensor:
        """See `Conversation`."""
        return stated_positions(self.mask, None if self.states is None else self.states.shape[0])

    def states_of(self, positions: torch.Tensor) -> torch.Tensor:
        """See `Conversation`."""
        assert self.states is not None, "a conversation with states"
        return self.states[state_rows(self.stated, positions)]


def responds_within(conversation: Conversation, max_tokens: int) -> bool:
    """Whether a token of the assistant's own is among the first `max_tokens`; reads none."""
    return conversation.first_response < min(max_tokens, conversation.num_tokens)


def stated_positions(mask: torch.Tensor, num_states: int | None) -> torch.Tensor:
    """`Conversation.stated`, bool `[T]`, for a mask `[T]` and a number of states (None without)."""
    if num_states is None:
        return torch.zeros_like(mask)
    if num_states == int(mask.sum()):
        return mask
    return torch.arange(mask.shape[0]) > 0


def state_rows(stated: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows int64 `[positions.sum()]` of the states that predicted some tokens; see `Conversation.states_of`."""
    rows = stated.long().cumsum(0) - 1
    return rows[: positions.shape[0]][positions]


def in_memory(conversation: Conversation, *, states: torch.Tensor | None) -> Sample:
    """A conversation read into memory, with states in place of its own."""
    return Sample(
        id=conversation.id,
        domain=conversation.domain,
        source=conversation.source,
        split=conversation.split,
        tokens=conversation.tokens,
        mask=conversation.mask,
        states=states,
        text=conversation.text,
    )


class Joined(Sequence[Conversation]):
    """Several sequences of conversations one after the other, as one; nothing is copied.

    Args:
        parts: of a corpus, its shards.
    """

    def __init__(self, parts: Sequence[Sequence[Conversation]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return Chosen(self, range(len(self))[index])
        place = range(len(self))[index]
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]


class Chosen(Sequence[Conversation]):
    """Some conversations out of others, by their places; nothing is copied.

    Args:
        conversations: out of which.
        places: their indices, in the order wanted: a range or an array, which takes less room than a list.
    """

    def __init__(self, conversations: Sequence[Conversation], places: Sequence[int]) -> None:
        self._conversations, self._places = conversations, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return Chosen(self._conversations, self._places[index])
        return self._conversations[self._places[index]]
