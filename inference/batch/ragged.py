"""One target pass over the blocks of many requests, each with a context and a width of its own.

The blocks lie one after another in a batch of one, so that linear layers see exactly the tokens there are. Attention
alone pads: queries to the widest block, by repeating a block's last row, and contexts to the longest, by a view of the
slots. Knows nothing of drafting or of who decides widths.

Letters in shapes: M blocks, N tokens of all of them, W tokens of the widest, L positions read of each slot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inference.attention import grouped_attention, overridden
from inference.batch.cache import Placement, SlotCache
from inference.errors import InputError
from inference.model import CausalModel

# More tokens in a pass of prompts save nothing, and its states want room.
_PREFILL_TOKENS = 2048
# Options of an attention function that change the products, per position or per head, beyond what a mask says.
_REFUSED = ("position_bias", "softcap", "s_aux", "cache")


def check_ragged(model: CausalModel) -> None:
    """Refuse a model whose requests cannot share a pass with contexts of different lengths.

    Raises:
        InputError: its attention does not take our masks, it takes no positions, or its positions depend on the
            longest request.
    """
    text = model.model.config.get_text_config(decoder=True)
    if not model.takes_siblings or getattr(text, "alibi", False):
        raise InputError(
            "this target cannot decode several requests in one pass",
            where="target",
            mend="use target.attention=sdpa and a family with position ids, or one request at a time",
        )
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if any(kind == "longrope" or "dynamic" in kind for kind in kinds):
        raise InputError(
            "this target's rotary positions depend on the longest request of a pass",
            where="target",
            mend="decode one request at a time",
        )


@torch.inference_mode()
def ragged_logits(
    model: CausalModel,
    tokens: Tensor,
    widths: Sequence[int],
    cache: SlotCache,
    *,
    rows: Tensor | None = None,
    slots: Sequence[Sequence[int]] = (),
    active: Sequence[int] | None = None,
) -> Tensor:
    """Feed each request's block after what its slot holds, in one pass.

    Args:
        model: the target; see `check_ragged`.
        tokens: int64 `[N]`, the blocks one after another, in the order of `active`.
        widths: tokens of each block, at least 1.
        cache: each slot that takes part is extended by its block's width; none if the pass raises.
        rows: int64 `[K]`, indices into the N tokens whose logits are wanted; None for all.
        slots: per block, the siblings at its end as `CausalModel.logits` takes them; empty for none at all.
        active: the slot of each block, each once; None for all active slots in order. Slots that do not follow each
            other are gathered.

    Returns:
        `[K, V]`, in the model's own dtype.

    Raises:
        InputError: a model that cannot take part; see `check_ragged`. Found out during the pass where attention, masks
            or states are not what transformers' interfaces promise.
        ValueError: widths, slots and tokens do not agree.
    """
    check_ragged(model)
    if tokens.shape[0] != sum(widths):
        raise ValueError(f"{tokens.shape[0]} tokens are not blocks of {list(widths)}")
    wanted: Tensor | int = 0 if rows is None else rows
    if rows is not None and not rows.shape[0]:
        wanted = 1
    with cache.placed(widths, active=active, device=tokens.device) as placement:
        plan = Plan.of(placement, slots)
        with overridden(plan):
            output = model.model(
                input_ids=tokens[None],
                position_ids=plan.positions[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=wanted,
                return_dict=True,
            )
        if not cache.nbytes():
            raise InputError(
                "this target keeps its states outside the cache",
                where="target",
                mend="use a family whose layers all attend",
            )
    logits: Tensor = output.logits[0]
    return logits if rows is None else logits[: rows.shape[0]]


def worthwhile_passes(widths: Sequence[int]) -> list[list[int]]:
    """Prompts of so many tokens in groups, as indices in order, that have so many as a pass is worth and no more."""
    groups: list[list[int]] = []
    held = 0
    for index, width in enumerate(widths):
        if not groups or held + width > _PREFILL_TOKENS:
            groups.append([])
            held = 0
        groups[-1].append(index)
        held += width
    return groups


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one pass attends: indices built once, used by every layer.

    Attributes:
        placement: where the cache puts and reads states.
        positions: int64 `[N]`, of tokens; a sibling has that of the token it stands beside.
        padded: int64 `[M, W]`, the token in each padded place; a block's last one is repeated.
        flat: int64 `[N]`, the padded place of each token, counted through M and W.
        siblings: int64 `[3, S]`: block, place in the block and column in the cache of each sibling.
        slots: the siblings of each block, as `ragged_logits` was given them.
    """

    placement: Placement
    positions: Tensor
    padded: Tensor
    flat: Tensor
    siblings: Tensor
    slots: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, placement: Placement, slots: Sequence[Sequence[int]]) -> "Plan":
        """The plan of a pass with these siblings per block.

        Raises:
            ValueError: siblings of another number of blocks, or beside a token their block does not have.
        """
        device, lengths = placement.lengths.device, placement.lengths
        widths = torch.tensor(placement.widths, device=device)
        starts = widths.cumsum(0) - widths
        widest = max(placement.widths)
        places = torch.arange(widest, device=device)
        padded = starts[:, None] + torch.minimum(places, widths[:, None] - 1)
        offsets = placement.columns - lengths[placement.block]
        found = _siblings(placement.widths, slots)
        siblings, beside = torch.tensor(found, dtype=torch.long, device=device).reshape(-1, 3).T.split([2, 1])
        block, place = siblings
        positions = placement.columns.clone()
        positions[starts[block] + place] = lengths[block] + beside[0]
        return cls(
            placement=placement,
            positions=positions,
            padded=padded,
            flat=placement.block * widest + offsets,
            siblings=torch.cat([siblings, (lengths[block] + place)[None]]),
            slots=tuple(tuple(beside) for beside in slots),
        )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """`[1, N, heads, head_dim]` and None, for queries `[1, heads, N, head_dim]` and what the cache returned.

        Raises:
            InputError: the family's attention is more than masked products, or it does not take our mask and states.
        """
        blocks, widest = self.padded.shape
        longest = self.placement.longest
        strange = attention_mask is None or attention_mask.shape != (blocks, 1, widest, longest)
        strange = strange or (key.shape[0], key.shape[2]) != (blocks, longest)
        special = [name for name in _REFUSED if options.get(name) is not None]
        if strange or special:
            why = f"has {special[0]}" if special else "does not follow the family's masks"
            raise InputError(
                f"this target's attention {why}, which several requests in one pass cannot have",
                where="target",
                mend="decode one request at a time",
            )
        # Blocks of one width, as those of target-only decoding, are padded as they lie.
        even = blocks * widest == query.shape[2]
        rows = query[0] if even else query[0].index_select(1, self.padded.flatten())
        mixed, _ = grouped_attention(
            module, rows.unflatten(1, (blocks, widest)).transpose(0, 1), key, value, attention_mask, **options
        )
        flat = mixed.flatten(0, 1)
        return (flat if even else flat.index_select(0, self.flat))[None], None

    def mask(self, mask_function: Callable[..., Tensor], **options: Any) -> Tensor:
        """`[M, 1, W, L]`: what a family's mask function says of each request's own positions, siblings put right.

        Raises:
            InputError: the function is not one of positions alone.
        """
        given = options.get("attention_mask")
        if options.get("use_vmap") or (given is not None and not bool(given.all())):
            raise InputError(
                "this target masks by more than positions, which several requests in one pass cannot have",
                where="target",
                mend="decode one request at a time",
            )
        placement, device = self.placement, self.padded.device
        one = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        queries = self.positions[self.padded][:, None, :, None]
        columns = torch.arange(placement.longest, device=device)[None, None, None, :]
        mask = mask_function(one, one, queries, columns)
        # Behind a block's end lies nothing of the request; siblings before it are seen by themselves alone.
        block, place, own = self.siblings
        widths = torch.tensor(placement.widths, device=device)
        chain_ends = placement.lengths + widths - torch.bincount(block, minlength=len(placement.widths))
        mask = mask & (columns < chain_ends[:, None, None, None])
        mask[block, 0, place, queries[block, 0, place, 0]] = False
        mask[block, 0, place, own] = True
        return mask


def _siblings(widths: Sequence[int], slots: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Block, place in the block, and place of the token it stands beside, of every sibling."""
    if slots and len(slots) != len(widths):
        raise ValueError(f"{len(widths)} blocks cannot have the siblings of {len(slots)}")
    found = []
    for block, (beside, width) in enumerate(zip(slots, widths, strict=False)):
        chain = width - len(beside)
        if any(not 0 <= slot < chain - 1 for slot in beside):
            raise ValueError(f"siblings {list(beside)} stand beside none of a chain of {chain - 1} tokens")
        found += [(block, chain + each, 1 + slot) for each, slot in enumerate(beside)]
    return found
