"""A key-value cache of many requests, one slot each, every slot with a length of its own. Not a scheduler.

Active requests take the first slots, so a pass of all of them reads a view of the buffers and gathers nothing. That
view reaches to the longest request: behind a shorter one the kernel sees states that are masked. Masked states must be
finite, because a weight of zero times NaN is NaN. So buffers are made of zeros, and what a rollback or a request that
left lets lie in a slot is zeroed by that slot's next pass.

Letters in shapes: M slots that take part in a pass, N tokens of all their blocks, L positions read of each slot.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

_INITIAL_CAPACITY = 256


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the tokens of one pass go, and what the pass reads. Tensors are int64.

    Attributes:
        slots: the M slots that take part, in the order of their blocks.
        widths: tokens of each block.
        lengths: `[M]`, valid positions of each slot before the pass.
        block: `[N]`, which of the M blocks each token belongs to.
        columns: `[N]`, the position each token's states are written to.
        rows: `[N]`, the slot they are written to.
        stale_rows: `[S]`, slots of states that lie behind a block's end from earlier on, to be zeroed.
        stale_columns: `[S]`, their positions.
        longest: L, the positions read of every slot.
    """

    slots: tuple[int, ...]
    widths: tuple[int, ...]
    lengths: Tensor
    block: Tensor
    columns: Tensor
    rows: Tensor
    stale_rows: Tensor
    stale_columns: Tensor
    longest: int

    def write(self, buffer: Tensor, states: Tensor) -> None:
        """Put states `[1, kv_heads, N, head_dim]` in their places; zero what is stale."""
        buffer[self.rows, :, self.columns] = states[0].transpose(0, 1)
        if self.stale_rows.shape[0]:
            buffer[self.stale_rows, :, self.stale_columns] = 0

    def read(self, buffer: Tensor) -> Tensor:
        """`[M, kv_heads, L, head_dim]`: a view where the slots follow each other, else a copy."""
        return _rows(buffer, self.slots, self.longest)


def _rows(buffer: Tensor, slots: tuple[int, ...], longest: int) -> Tensor:
    """See `Placement.read`."""
    first = slots[0]
    if slots == tuple(range(first, first + len(slots))):
        return buffer[first : first + len(slots), :, :longest]
    return buffer[:, :, :longest].index_select(0, torch.tensor(slots, device=buffer.device))


class _Ledger:
    """What all layers of one cache share.

    Attributes:
        lengths: valid positions of each active slot.
        written: for every slot that was ever active, the end of what may lie in it; zeros follow.
        placement: of the pass that is being made.
    """

    def __init__(self, *, max_slots: int, max_tokens: int) -> None:
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.lengths: list[int] = []
        self.written: list[int] = []
        self.placement: Placement | None = None


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, `[slots, kv_heads, capacity, head_dim]`."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values of all slots; none before the first pass."""
        return (self._key_buffer, self._value_buffer) if self.is_initialized else ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, dtype and device from the first states; the buffers themselves come with the first write."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_buffer = key_states.new_zeros((0, key_states.shape[1], 0, key_states.shape[-1]))
        self._value_buffer = value_states.new_zeros((0, value_states.shape[1], 0, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write states `[1, kv_heads, N, head_dim]` where the pass places them; return what the pass reads."""
        placement = self._ledger.placement
        assert placement is not None, "a slot cache is written by a ragged pass alone"
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._reserve(len(self._ledger.lengths), placement.longest)
        placement.write(self._key_buffer, key_states)
        placement.write(self._value_buffer, value_states)
        return placement.read(self._key_buffer), placement.read(self._value_buffer)

    def get_seq_length(self) -> int:
        """Valid positions of the longest request."""
        return max(self._ledger.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that the pass reads of every slot, and the first of them."""
        placement = self._ledger.placement
        return (self.get_seq_length() + query_length if placement is None else placement.longest), 0

    def get_max_length(self) -> int:
        """Most positions a slot may hold."""
        return self._ledger.max_tokens

    def copy_slot(self, source: int, destination: int, *, length: int) -> None:
        """Let the first `length` positions of one slot lie in another as well."""
        if self.is_initialized:
            self._reserve(destination + 1, length)
        for buffer in self.buffers:
            buffer[destination, :, :length] = buffer[source, :, :length]

    def move(self, slots: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """Let the states of one position of each of some slots stand at another; int64 `[K]` each."""
        for buffer in self.buffers:
            buffer[slots, :, destinations] = buffer[slots, :, sources]

    def nbytes(self) -> int:
        """Bytes held by the two buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def _reserve(self, slots: int, positions: int) -> None:
        """Grow the buffers by doubling until they hold so many slots and positions."""
        held_slots, _, held_positions, _ = self._key_buffer.shape
        if slots <= held_slots and positions <= held_positions:
            return
        most_slots, most_positions = self._ledger.max_slots, self._ledger.max_tokens
        if slots > held_slots:
            held_slots = min(most_slots, max(2 * held_slots, slots))
        if positions > held_positions:
            doublings = math.ceil(math.log2(max(1.0, positions / _INITIAL_CAPACITY)))
            held_positions = min(most_positions, _INITIAL_CAPACITY << doublings)
        self._key_buffer = _grown(self._key_buffer, held_slots, held_positions)
        self._value_buffer = _grown(self._value_buffer, held_slots, held_positions)


def _grown(buffer: Tensor, slots: int, positions: int) -> Tensor:
    """A larger buffer of zeros with this one in its corner."""
    grown = buffer.new_zeros((slots, buffer.shape[1], positions, buffer.shape[3]))
    grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown


class SlotCache(Cache):
    """One `SlotLayer` per decoder layer; sliding-window layers keep all positions and are masked by the model.

    Args:
        num_layers: decoder layers.
        max_slots: most requests at once; the buffers grow to them by doubling.
        max_tokens: most positions of a request, likewise.

    Example:
        cache = SlotCache.for_config(target.model.config, max_slots=8)
        slot = cache.join()
        ragged_logits(target, prompt, [len(prompt)], cache, active=[slot])
    """

    def __init__(self, num_layers: int, *, max_slots: int, max_tokens: int) -> None:
        self._ledger = _Ledger(max_slots=max_slots, max_tokens=max_tokens)
        self.slot_layers = [SlotLayer(self._ledger) for _ in range(num_layers)]
        super().__init__(layers=[*self.slot_layers])

    @classmethod
    def for_config(cls, config: PreTrainedConfig, *, max_slots: int) -> "SlotCache":
        """An empty cache for a model of this configuration and its whole context."""
        text = config.get_text_config(decoder=True)
        return cls(text.num_hidden_layers, max_slots=max_slots, max_tokens=text.max_position_embeddings)

    @property
    def lengths(self) -> list[int]:
        """Valid positions of each active slot, from slot 0 on."""
        return [*self._ledger.lengths]

    @property
    def placement(self) -> Placement | None:
        """Of the pass that is being made; None between passes."""
        return self._ledger.placement

    def join(self) -> int:
        """Activate the next slot, empty, and return it.

        Raises:
            ValueError: all slots are taken.
        """
        lengths, written = self._ledger.lengths, self._ledger.written
        if len(lengths) == self._ledger.max_slots:
            raise ValueError(f"all {len(lengths)} slots are taken")
        lengths.append(0)
        if len(written) < len(lengths):
            written.append(0)
        return len(lengths) - 1

    @torch.inference_mode()
    def fork(self, source: int, length: int) -> int:
        """Activate the next slot with the first `length` positions of an active one in it, and return it.

        Raises:
            ValueError: all slots are taken, or the source does not hold so many.
        """
        lengths, written = self._ledger.lengths, self._ledger.written
        if not 0 <= source < len(lengths) or lengths[source] < length:
            raise ValueError(f"no active slot {source} with {length} positions")
        slot = SlotCache.join(self)
        for layer in self.slot_layers:
            layer.copy_slot(source, slot, length=length)
        lengths[slot] = length
        written[slot] = max(written[slot], length)
        return slot

    @torch.inference_mode()
    def leave(self, slot: int) -> int | None:
        """Free a slot; the last one's valid states move into its place, so that active slots stay the first ones.

        Returns:
            The slot whose request now has this one, None if the slot was itself the last.

        Raises:
            ValueError: no active slot.
        """
        lengths, written = self._ledger.lengths, self._ledger.written
        if not 0 <= slot < len(lengths):
            raise ValueError(f"slot {slot} is not among the {len(lengths)} active ones")
        length = lengths.pop()
        last = len(lengths)
        if slot == last:
            return None
        for layer in self.slot_layers:
            layer.copy_slot(last, slot, length=length)
        lengths[slot] = length
        written[slot] = max(written[slot], length)
        return last

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forget, in every active slot, all positions from its entry on; moves numbers, no states.

        Raises:
            ValueError: not one length per active slot, or one beyond what its slot holds.
        """
        held = self._ledger.lengths
        if len(lengths) != len(held) or any(new > old for new, old in zip(lengths, held, strict=True)):
            raise ValueError(f"cannot roll back {held} positions to {list(lengths)}")
        held[:] = lengths

    @torch.inference_mode()
    def move(self, slots: Sequence[int], sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Let the states of one position of each of these slots stand at another, in all layers.

        All lie in the buffers until the slot's next pass; a rollback does not clear them.
        """
        if not slots or not self.slot_layers[0].buffers:
            return
        device = self.slot_layers[0].device
        places = [torch.tensor(list(places), device=device) for places in (slots, sources, destinations)]
        for layer in self.slot_layers:
            layer.move(*places)

    def read(self, slots: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of some active slots, by layer, up to the longest of them; see `Placement.read`."""
        longest = max(self._ledger.lengths[slot] for slot in slots)
        found = []
        for layer in self.slot_layers:
            keys, values = (_rows(buffer, tuple(slots), longest) for buffer in layer.buffers)
            found.append((keys, values))
        return found

    @contextmanager
    def placed(
        self, widths: Sequence[int], *, active: Sequence[int] | None, device: torch.device
    ) -> Iterator[Placement]:
        """One pass of the model inside the block writes these blocks behind what their slots hold.

        A block left by an exception leaves all lengths as they were.

        Args:
            widths: tokens of each block, at least 1.
            active: the slot of each block, each once; None for all active slots in order.
            device: where the indices go.

        Raises:
            ValueError: widths, slots or the room in them are not as said.
        """
        ledger = self._ledger
        slots = tuple(range(len(ledger.lengths)) if active is None else active)
        placement = self._placement(slots, tuple(widths), device)
        ends = [ledger.lengths[slot] + width for slot, width in zip(slots, widths, strict=True)]
        for slot, end in zip(slots, ends, strict=True):
            ledger.written[slot] = max(ledger.written[slot], end)
        ledger.placement = placement
        try:
            yield placement
        finally:
            ledger.placement = None
        for slot, end in zip(slots, ends, strict=True):
            ledger.lengths[slot] = ledger.written[slot] = end

    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(layer.nbytes() for layer in self.slot_layers)

    def _placement(self, slots: tuple[int, ...], widths: tuple[int, ...], device: torch.device) -> Placement:
        ledger = self._ledger
        if len(slots) != len(widths) or not slots or min(widths) < 1:
            raise ValueError(f"{len(slots)} slots cannot take blocks of {list(widths)} tokens")
        if len(set(slots)) < len(slots) or not all(0 <= slot < len(ledger.lengths) for slot in slots):
            raise ValueError(f"slots {list(slots)} are not {len(slots)} of the {len(ledger.lengths)} active ones")
        lengths = [ledger.lengths[slot] for slot in slots]
        ends = [length + width for length, width in zip(lengths, widths, strict=True)]
        if max(ends) > ledger.max_tokens:
            raise ValueError(f"{max(ends)} positions of a request do not fit in {ledger.max_tokens}")
        # Of a slot that holds more than the pass extends it to, the rest is stale.
        spans = [max(0, ledger.written[slot] - end) for slot, end in zip(slots, ends, strict=True)]
        index = torch.tensor([slots, lengths, widths, ends, spans], device=device)
        block, offsets = _ragged_arange(index[2], sum(widths))
        stale, behind = _ragged_arange(index[4], sum(spans))
        return Placement(
            slots=slots,
            widths=widths,
            lengths=index[1],
            block=block,
            columns=index[1][block] + offsets,
            rows=index[0][block],
            stale_rows=index[0][stale],
            stale_columns=index[3][stale] + behind,
            longest=max(ends),
        )


def _ragged_arange(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For counts `[M]` of sum `total`: which entry each of `total` items belongs to, and its place there from 0."""
    entries = torch.arange(counts.shape[0], device=counts.device)
    owner = torch.repeat_interleave(entries, counts, output_size=total)
    starts = counts.cumsum(0) - counts
    return owner, torch.arange(total, device=counts.device) - starts[owner]
