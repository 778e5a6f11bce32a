"""A target whose passes have fixed shapes: every request has a place in buffers as long as the longest may become.

Letters in shapes: B requests, W tokens of each in a pass, C positions a request may hold, S of them that a pass reads,
R requests of a pass, D hidden size, m taps.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from inference.attention import added
from inference.batch.ragged import check_ragged
from inference.errors import InputError
from inference.graphed.attending import attend_held, can_attend
from inference.graphed.held import Held
from inference.graphed.turning import turn_held
from inference.lean import LeanLayer, lean_layers, rolled_tables
from inference.model import CausalModel
from inference.taps import EMBEDDING
from inference.trees import TreePlan

# Positions read are cut to multiples of this, which masked attention kernels want.
ALIGNMENT = 64


class StaticTarget:
    """Passes of a target over requests in fixed places. What lies behind a request's length is never looked at.

    Args:
        target: of lean layers, on one device.
        batch: B.
        capacity: C; a multiple of `ALIGNMENT`.
        taps: decoder layers whose outputs are wanted.
        keep_states: keep the head's inputs of all positions.
        keep_features: keep the outputs of `taps`, in bf16.

    Attributes:
        target: as given.
        batch: as given.
        capacity: as given.
        states: `[B, C, D]`, what is kept; None unless asked for.
        features: bf16 `[B, C, m * D]`, likewise.

    Raises:
        InputError: layers of another make, layers that do not see all positions, positions that depend on other
            requests, or another capacity.
    """

    def __init__(
        self,
        target: CausalModel,
        *,
        batch: int,
        capacity: int,
        taps: Sequence[int] = (),
        keep_states: bool = False,
        keep_features: bool = False,
    ) -> None:
        layers = static_layers(target)
        _check_windows(target, capacity)
        if capacity % ALIGNMENT:
            raise InputError(
                f"{capacity} positions are no multiple of {ALIGNMENT}",
                where="target",
                mend="decode with another capacity, or without captured rounds",
            )
        self.target, self.batch, self.capacity, self.taps = target, batch, capacity, tuple(taps)
        self._layers = layers
        model, device = target.model, target.device
        if device.type == "cuda":
            for layer in layers:
                layer.join_weights()
        self._embedding = model.get_input_embeddings()
        self._norm = model.base_model.norm
        probe = self._embedding(torch.zeros(1, 1, dtype=torch.long, device=device))
        self.dtype = probe.dtype
        tables = rolled_tables(*model.base_model.rotary_emb(probe, torch.arange(capacity, device=device)[None]))
        self._cosine, self._sine = (table[0].clone() for table in tables)
        first = layers[0]
        self._held = Held(
            len(layers),
            batch=batch,
            capacity=capacity,
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
            dtype=self.dtype,
            device=device,
        )
        width = probe.shape[-1]
        self.states = torch.zeros(batch, capacity, width, dtype=self.dtype, device=device) if keep_states else None
        self.features = (
            torch.zeros(batch, capacity, len(self.taps) * width, dtype=torch.bfloat16, device=device)
            if keep_features
            else None
        )
        self._columns = torch.arange(capacity, device=device)
        self._every = torch.arange(batch, device=device)
        self._groups = first.heads // first.kv_heads
        self._by_kernel = can_attend(probe, head_dim=first.head_dim)

    def run(
        self, ids: Tensor, starts: Tensor, rows: Tensor | None, *, shown: int, tree: TreePlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Feed W tokens to each of R requests, at their own positions; later ones there are overwritten.

        Args:
            ids: int64 `[R, W]`.
            starts: int64 `[R]`, positions before the tokens, at most C - W.
            rows: int64 `[R]`, the requests; None for the first R, whose keys and values are read where they lie.
            shown: S, at least what any of them holds with these tokens.
            tree: whose anchor and nodes the tokens are; None for a chain. See `keep` for what stays of it.

        Returns:
            The head's inputs `[R, W, D]`, and features `[R, W, m * D]`, `[R, W, 0]` without taps.
        """
        count, width = ids.shape
        held = starts[:, None] + torch.arange(width, device=ids.device)
        places = self._every[:count] if rows is None else rows
        flat = (places[:, None] * self.capacity + held).flatten()
        positions = held if tree is None else starts[:, None] + tree.depths
        tables = self._cosine[positions], self._sine[positions]
        mask = None if self._by_kernel else self._mask(held, starts, shown, tree)
        states: Tensor = self._embedding(ids)
        tapped = {EMBEDDING: states}
        for index, layer in enumerate(self._layers):
            if mask is None:
                own, turns = layer.before(states).flatten(0, 1), (table.flatten(0, 2) for table in tables)
                queries = turn_held(own, *turns, self._held.states, index, flat, heads=layer.heads)
                queries, among = queries.unflatten(0, (count, width)), None if tree is None else tree.above
                mixed = attend_held(queries, self._held.states, index, starts, rows, among, scale=layer.scaling)
                states = layer.after(states, mixed)
            else:
                mix = functools.partial(self._mix, index=index, flat=flat, rows=rows, mask=mask, shown=shown)
                states = layer.run(states, tables, mix)
            if index in self.taps:
                tapped[index] = states
        features = torch.cat([tapped[tap] for tap in self.taps], dim=-1) if self.taps else states[..., :0]
        normed: Tensor = self._norm(states)
        for kept, new in ((self.states, normed), (self.features, features)):
            if kept is not None:
                kept.view(-1, kept.shape[-1]).index_copy_(0, flat, new.flatten(0, 1).to(kept.dtype))
        return normed, features

    def _mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        index: int,
        flat: Tensor,
        rows: Tensor | None,
        mask: Tensor,
        shown: int,
    ) -> Tensor:
        """Keep new keys and values of a layer, and attend without a kernel of our own; see `inference.lean.Mix`."""
        count, width = query.shape[0], query.shape[2]
        self._held.write(index, key, value, flat)
        keys, values = (
            (read[:count] if rows is None else read.index_select(0, rows)).transpose(1, 2)
            for read in self._held.of(index, shown=shown)
        )
        stacked = query.reshape(count, key.shape[1], self._groups * width, -1)
        scale = self._layers[index].scaling
        mixed = functional.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=scale)
        return mixed.reshape(query.shape).transpose(1, 2)

    def _mask(self, held: Tensor, starts: Tensor, shown: int, tree: TreePlan | None) -> Tensor:
        """What is added to products, `[R, 1, groups * W, S]`: the queries of a group are further rows of one.

        Args:
            held: int64 `[R, W]`, positions of the tokens of a chain.
            starts: int64 `[R]`.
            shown: S.
            tree: None for a chain.
        """
        if tree is None:
            seen = self._columns[:shown] <= held[:, :, None]
        else:
            behind = (self._columns[:shown] - starts[:, None]).clamp(-1, held.shape[1]) + 1
            seen = tree.seen[:, behind].transpose(0, 1)
        return added(seen, self.dtype).repeat(1, self._groups, 1)[:, None]

    def keep(self, ways: Tensor, starts: Tensor) -> None:
        """Let tokens of the pass over a tree lie one after another, at the first places of the pass.

        Args:
            ways: int64 `[R, n]`, which of the W tokens of the first R requests, the first in the first place.
            starts: int64 `[R]`, positions before the pass.
        """
        count, length = ways.shape
        first = (self._every[:count] * self.capacity + starts)[:, None]
        source, place = (first + ways).flatten(), (first + torch.arange(length, device=ways.device)).flatten()
        self._held.keep(place, source)
        for kept in (self.states, self.features):
            if kept is not None:
                rows = kept.flatten(0, 1)
                rows.index_copy_(0, place, rows.index_select(0, source))

    def move(self, source: int, place: int, *, length: int) -> None:
        """Let a request's first positions lie in another place too, with all that is kept of them."""
        self._held.move(source, place, length=length)
        for kept in (self.states, self.features):
            if kept is not None:
                kept[place, :length] = kept[source, :length]

    def logits(self, states: Tensor) -> Tensor:
        """`[..., V]` of the head's inputs."""
        logits: Tensor = self.target.head(states)
        return logits

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._held.nbytes()


def static_layers(target: CausalModel) -> list[LeanLayer]:
    """The layers of a target that can be run in fixed shapes, as far as that does not depend on the length of requests.

    Raises:
        InputError: layers of another make, or positions that depend on other requests.
    """
    check_ragged(target)
    layers = lean_layers(target.model)
    if layers is None:
        raise InputError(
            "this target's layers cannot be captured", where="target", mend="decode without captured rounds"
        )
    return layers


def _check_windows(target: CausalModel, capacity: int) -> None:
    """Refuse a target whose layers see the last positions only, where requests outgrow that."""
    text = target.model.config.get_text_config(decoder=True).to_dict()
    kinds = set(text.get("layer_types") or ())
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    narrow = kinds != {"full_attention"} and window is not None and window < capacity
    if narrow or kinds - {"full_attention", "sliding_attention"}:
        raise InputError(
            f"this target's layers see {window or 'parts'} of {capacity} positions, captured rounds all of them",
            where="target",
            mend="decode without captured rounds",
        )
