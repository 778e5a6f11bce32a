"""What a draft has read of each request, in buffers of a fixed size: `DraftContext` without a length that Python knows.

Letters in shapes: B requests, C positions each may hold, S of them that a draft reads.
"""

import torch
from torch import Tensor
from torch.nn import functional

from inference.attention import added
from inference.feature_networks._layers import DraftShape, KeysValues
from inference.graphed.attending import attend_held, can_attend
from inference.graphed.held import Held
from inference.trees import Level, TreePlan


class StaticContext:
    """Keys and values of B requests; their lengths lie on the device.

    Args:
        num_layers: of the draft whose keys and values are kept.
        shape: of the draft.
        batch: B.
        capacity: C.
        dtype: of the draft's states.
        device: where they lie.
        tree: that is drafted behind them, if any is.

    Attributes:
        held: int64 `[B]`, positions of each request.
        shown: S; set before a draft reads.
    """

    def __init__(
        self,
        num_layers: int,
        shape: DraftShape,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        tree: TreePlan | None = None,
    ) -> None:
        self._states = Held(
            num_layers,
            batch=batch,
            capacity=capacity,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
            device=device,
        )
        self._last = torch.zeros(batch, 1, shape.hidden, dtype=dtype, device=device)
        self.held = torch.zeros(batch, dtype=torch.long, device=device)
        self._columns = torch.arange(capacity, device=device)
        self._capacity, self.shown = capacity, capacity
        self._every = torch.arange(batch, device=device)
        self._rows, self._kept, self._width, self._added = self._every, self.held, 0, 0
        self._drafted = batch
        self._by_kernel = can_attend(self._last, head_dim=shape.head_dim)
        # Which tokens of the tree one sees, bool `[1 + E, E]`.
        self._among = self._columns if tree is None else tree.drafting[:, 1:-1].contiguous()
        # What is added to products of the tokens of a tree, `[groups * (1 + E), E + 2]`; see `TreePlan.drafting`.
        self._tree = (
            None if tree is None else added(tree.drafting, dtype).repeat_interleave(shape.heads // shape.kv_heads, 0)
        )
        self._tree_mask = self._tree_places = self._columns

    def reading(self, rows: Tensor, kept: Tensor, *, width: int) -> None:
        """A network is about to read `width` tokens of each of these requests, of which the first `kept` count.

        Args:
            rows: int64 `[R]`.
            kept: int64 `[R]`, at least 1.
            width: tokens of each.
        """
        self._rows, self._kept, self._width = rows, kept, width

    def starting(self, rows: Tensor, held: Tensor) -> None:
        """These requests hold so many positions, int64 `[R]`, before a piece of their prompts is read; whatever the
        requests before them in their places held is forgotten."""
        self.held.index_copy_(0, rows, held)

    def read(self, held: Tensor) -> None:
        """The network has read them; they hold so many positions now, int64 `[R]`."""
        self.held.index_copy_(0, self._rows, held)

    def drafting(self, requests: int | None = None) -> None:
        """A network is about to draft for the first so many requests; None for all."""
        self._drafted = self._every.shape[0] if requests is None else requests
        self._added = 0

    def clear(self, place: int) -> None:
        """Let a request hold nothing."""
        self.held[place].fill_(0)
        self._last[place].fill_(0.0)

    def move(self, source: int, place: int) -> None:
        """Let a request lie in another place too."""
        for tensor in (self.held, self._last):
            tensor[place] = tensor[source]
        self._states.move(source, place, length=self._capacity)

    def state(self) -> list[Tensor]:
        """What a round changes of all requests, keys and values apart."""
        return [self.held, self._last]

    # `DraftContext`

    @property
    def last(self) -> Tensor:
        """See `DraftContext`."""
        return self._last[: self._drafted]

    def coming(self, count: int, device: torch.device) -> Tensor:
        """See `DraftContext.coming`."""
        return (self.held[self._rows][:, None] + self._columns[: self._width]).reshape(1, count)

    def extend(self, context: KeysValues) -> None:
        """See `DraftContext.extend`."""
        places = self.held[self._rows][:, None] + self._columns[: self._width]
        self._write(context, (self._rows[:, None] * self._capacity + places).flatten())

    def keep_last(self, states: Tensor) -> None:
        """See `DraftContext.keep_last`."""
        ends = torch.arange(self._rows.shape[0], device=states.device) * self._width + self._kept - 1
        self._last.index_copy_(0, self._rows, states[0, ends][:, None])

    def lengths(self, device: torch.device) -> Tensor:
        """See `DraftContext.lengths`."""
        return self.held[: self._drafted]

    def keys_values(self) -> KeysValues:
        """See `DraftContext.keys_values`."""
        return [self._read(layer) for layer in range(self._states.states.shape[1])]

    def mask(self) -> Tensor:
        """See `DraftContext.mask`."""
        seen = self.held[: self._drafted] + self._added
        return (self._columns[: self.shown] < seen[:, None])[:, None, None]

    def lengthen(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DraftContext.lengthen`."""
        place = (self._every * self._capacity + self.held + self._added)[: self._drafted]
        # Requests become the tokens of one row.
        self._write([(keys.permute(2, 1, 0, 3), values.permute(2, 1, 0, 3))], place)
        self._added += 1
        return (*self.keys_values()[0], self.mask())

    # `TreeContext`

    def branching(self) -> None:
        """After `drafting`: the tree is about to be drafted."""
        assert self._tree is not None, "a context of trees knows which"
        entries = self._tree.shape[1] - 2
        rows = self._drafted
        if not self._by_kernel:
            # Of a request that holds nothing all see its first place: a softmax over nothing is not a number.
            behind = self._columns[: self.shown] - self.held[:rows, None].clamp(min=1)
            self._tree_mask = self._tree[:, behind.clamp(-1, entries) + 1].transpose(0, 1)[:, None]
        starts = (self._every * self._capacity + self.held)[:rows, None]
        self._tree_places = starts + self._columns[:entries]

    def branch(self, level: Level, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `TreeContext.branch`."""
        rows, count, heads, width = queries.shape
        kv_heads = keys.shape[2]
        groups = heads // kv_heads
        if level.depth:
            places = self._tree_places[:, level.first : level.first + count].flatten()
            self._states.write(0, keys.transpose(1, 2), values.transpose(1, 2), places)
        if self._by_kernel:
            among = self._among[level.row : level.row + count]
            states, held = self._states.states, self.held[:rows]
            found: Tensor = attend_held(queries, states, 0, held, among=among, scale=width**-0.5)
            return found.flatten(2)
        held_keys, held_values = self._read(0)
        stacked = queries.unflatten(2, (kv_heads, groups)).transpose(1, 2).flatten(2, 3)
        mask = self._tree_mask[:, :, groups * level.row : groups * (level.row + count)]
        mixed = functional.scaled_dot_product_attention(stacked, held_keys, held_values, attn_mask=mask)
        apart: Tensor = mixed.unflatten(2, (count, groups)).transpose(1, 2).flatten(2)
        return apart

    def nbytes(self) -> int:
        """Bytes held."""
        return self._last.nbytes + self._states.nbytes()

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, `[R, kv_heads, S, head_dim]` of the requests that draft."""
        keys, values = self._states.of(layer, shown=self.shown)
        return keys[: self._drafted].transpose(1, 2), values[: self._drafted].transpose(1, 2)

    def _write(self, states: KeysValues, flat: Tensor) -> None:
        """Put states `[1, kv_heads, N, head_dim]` of each layer at N places of all requests' positions."""
        dtype = self._states.states.dtype
        for layer, (keys, values) in enumerate(states):
            self._states.write(layer, keys.to(dtype), values.to(dtype), flat)
