"""Decoder layers run as a plain row of products, where a layer is of the common make: calls of modules take a
noticeable part of a pass of a few tokens (docs/experiments.md, 2026-11-29).

The common make: two RMS norms, rotary attention of grouped queries, a gated feed-forward. Families are not known by
name. A layer is taken apart by the names transformers gives to such parts, and kept as it is unless both ways of
running it agree on random states; whatever a family does besides (a multiplier, another rotation) shows there.
Masks, positions, the cache and hooks on layers stay what they were.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from inference.errors import InputError
from inference.layers import decoder_layers
from inference.precision import PartLinear

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_QUERY_NORMS = {"q_norm", "k_norm"}
_GATED = {"gate_proj", "up_proj", "down_proj"}
_CHECKED_TOKENS = 5
# Largest relative difference of a layer's two outputs that rounding explains, by bits of its states' dtype.
_ROUNDING = {64: 1e-5, 32: 1e-4, 16: 3e-2}

Product = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries `[batch, heads, n, head_dim]`, new keys and values `[batch, kv_heads, n, head_dim]` to `[batch, n, heads,
head_dim]`."""


def use_lean_layers(model: PreTrainedModel) -> int:
    """Let the decoder layers of a model run leanly where no gradient is asked for, in place.

    Returns:
        how many do; the others, of another make, stay as they are.
    """
    try:
        layers, rotary = decoder_layers(model), model.base_model.get_submodule("rotary_emb")
    except (InputError, AttributeError):
        return 0
    tables, count = _Tables(), 0
    for layer in layers:
        if not _is_common(layer):
            continue
        lean = LeanLayer(layer, tables)
        if _agrees(lean, layer, rotary):
            layer.forward = lean.forward
            count += 1
    return count


def lean_layers(model: PreTrainedModel) -> "list[LeanLayer] | None":
    """The layers of a model as they run leanly; None unless all do."""
    found = [getattr(vars(layer).get("forward"), "__self__", None) for layer in decoder_layers(model)]
    lean = [layer for layer in found if isinstance(layer, LeanLayer)]
    return lean if len(lean) == len(found) else None


def use_plain_layers(model: PreTrainedModel) -> None:
    """Undo `use_lean_layers`: for a model whose weights lie elsewhere until a module is called."""
    for layer in decoder_layers(model):
        vars(layer).pop("forward", None)


class _Tables:
    """Rotary tables of the pass that is being made, laid out once for all of its layers."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, Tensor] | None = None
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See `rolled_tables`."""
        if self._made is None or given is not self._given:
            self._given, self._made = given, rolled_tables(*given)
        return self._made


def rolled_tables(cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables `[batch, n, head_dim]` as `LeanLayer.run` takes them: `[batch, n, 1, head_dim]`, the sine's first
    half negated, so that a rotation is a roll."""
    first, second = sine.chunk(2, dim=-1)
    return cosine[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]


class LeanLayer:
    """One decoder layer of the common make.

    Args:
        layer: whose weights and attention it uses; its own forward runs where gradients are wanted.
        tables: shared by the layers of a model.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        scaling: of the products of queries and keys.
    """

    def __init__(self, layer: nn.Module, tables: _Tables) -> None:
        self._plain: Callable[..., Tensor] = layer.forward
        self._tables = tables
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self._attention, self._mlp, self._config = attention, mlp, attention.config
        self.head_dim: int = attention.head_dim
        self.heads = _width(attention.q_proj) // self.head_dim
        self.kv_heads = _width(attention.k_proj) // self.head_dim
        self.scaling: float = attention.scaling
        self._before, self._after = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        normed = hasattr(attention, "q_norm")
        self._norms = (_Norm(attention.q_norm), _Norm(attention.k_norm)) if normed else None
        self._projected = _joint(attention.q_proj, attention.k_proj, attention.v_proj)
        self._mixed = _product(attention.o_proj)
        self._gated = _joint(mlp.gate_proj, mlp.up_proj)
        self._inner = _width(mlp.gate_proj)
        # Who puts other modules in the place of these, as adapters do, wants those to run.
        self._taken = [
            (part._modules, name, module) for part in (attention, mlp) for name, module in part._modules.items()
        ]
        self._down = _product(mlp.down_proj)
        self._is_joined = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """As the layer's own: states `[batch, n, D]` to states."""
        if torch.is_grad_enabled() or position_embeddings is None or not self._whole():
            return self._plain(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **options,
            )
        attention = self._attention

        def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, attention.layer_idx)
            mixed: Tensor = ALL_ATTENTION_FUNCTIONS[self._config._attn_implementation](
                attention,
                query,
                key,
                value,
                attention_mask,
                dropout=0.0,
                scaling=attention.scaling,
                sliding_window=getattr(attention, "sliding_window", None),
                **options,
            )[0]
            return mixed

        return self.run(hidden_states, self._tables.of(position_embeddings), mix)

    def _whole(self) -> bool:
        """Whether the layer still has the parts it was taken apart into."""
        return all(held.get(name) is module for held, name, module in self._taken)

    def run(self, states: Tensor, tables: tuple[Tensor, Tensor], mix: Mix) -> Tensor:
        """The layer with an attention of the caller's.

        Args:
            states: `[batch, n, D]`.
            tables: see `rolled_tables`.
            mix: keeps keys and values and attends.

        Returns:
            `[batch, n, D]`.
        """
        heads, both = self.heads, self.heads + self.kv_heads
        cosine, sine = tables
        rows = self._rows(states)
        turned = rows[:, :, :both] if self._norms is None else torch.cat(self._normed(rows), dim=2)
        turned = torch.addcmul(turned * cosine, turned.roll(self.head_dim // 2, -1), sine).transpose(1, 2)
        mixed = mix(turned[:, :heads], turned[:, heads:], rows[:, :, both:].transpose(1, 2))
        return self.after(states, mixed)

    def before(self, states: Tensor) -> Tensor:
        """What attention is made of, for who turns queries and keys by their positions himself.

        Args:
            states: `[batch, n, D]`.

        Returns:
            Queries, keys and values, `[batch, n, heads + 2 * kv_heads, head_dim]`.
        """
        rows = self._rows(states)
        if self._norms is None:
            return rows
        return torch.cat([*self._normed(rows), rows[:, :, self.heads + self.kv_heads :]], dim=2)

    def _rows(self, states: Tensor) -> Tensor:
        """As `before`, without norms of queries and keys."""
        return self._projected(self._before.of(states)).view(*states.shape[:2], -1, self.head_dim)

    def _normed(self, rows: Tensor) -> list[Tensor]:
        """Queries and keys of rows, normed."""
        assert self._norms is not None, "asked where there are norms"
        queries, keys = self._norms
        heads = self.heads
        return [queries.of(rows[:, :, :heads]), keys.of(rows[:, :, heads : heads + self.kv_heads])]

    def after(self, states: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer.

        Args:
            states: `[batch, n, D]`, which the layer was given.
            mixed: `[batch, n, heads, head_dim]`, what attention made of them.

        Returns:
            `[batch, n, D]`.
        """
        hidden = states + self._mixed(mixed.flatten(2))
        inner = self._gated(self._after.of(hidden))
        opened = functional.silu(inner[..., : self._inner]) * inner[..., self._inner :]
        return hidden + self._down(opened)

    def join_weights(self) -> None:
        """Let the weights of products that read the same lie in one tensor, of which the layers' own become parts.

        For plain linear layers alone; nothing is held twice. Once: who has captured these products goes on reading the
        very tensors.
        """
        if self._is_joined:
            return
        self._is_joined = True
        attention, mlp = self._attention, self._mlp
        self._projected = as_one(attention.q_proj, attention.k_proj, attention.v_proj) or self._projected
        self._gated = as_one(mlp.gate_proj, mlp.up_proj) or self._gated


class _Norm:
    """An RMS norm over the last dimension."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm
        self._eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0.0)
        self._shape = tuple(norm.weight.shape)

    def of(self, states: Tensor) -> Tensor:
        """The states, normed."""
        return torch.rms_norm(states, self._shape, self._norm.weight, self._eps)


def _is_common(layer: nn.Module) -> bool:
    """Whether a layer has the parts of the common make and no others."""
    children = dict(layer.named_children())
    if set(children) != _PARTS:
        return False
    attention, mlp = dict(children["self_attn"].named_children()), dict(children["mlp"].named_children())
    norms = [children["input_layernorm"], children["post_attention_layernorm"]]
    extra = set(attention) - _ATTENTION
    if extra not in (set(), _QUERY_NORMS) or not set(attention) >= _ATTENTION:
        return False
    norms += [attention[name] for name in sorted(extra)]
    plain = all([name for name, _ in norm.named_parameters()] == ["weight"] for norm in norms)
    return plain and set(mlp) - {"act_fn"} == _GATED and hasattr(children["self_attn"], "head_dim")


@torch.inference_mode()
def _agrees(lean: LeanLayer, layer: nn.Module, rotary: nn.Module) -> bool:
    """Whether both ways of running a layer give the same, within its arithmetic's rounding."""
    weight = layer.get_submodule("input_layernorm").get_parameter("weight")
    states = torch.randn(1, _CHECKED_TOKENS, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    states = states.to(weight.device, weight.dtype)
    # Far positions too, so that another rotation shows.
    positions = torch.arange(_CHECKED_TOKENS, device=weight.device)[None] * 7
    mask = torch.ones(_CHECKED_TOKENS, _CHECKED_TOKENS, dtype=torch.bool, device=weight.device).tril()[None, None]
    try:
        asked: dict[str, Any] = {"attention_mask": mask, "position_embeddings": rotary(states, positions)}
        wanted = layer.forward(states, position_ids=positions, **asked)
        given = lean.forward(states, position_ids=positions, **asked)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(wanted, Tensor) or wanted.shape != given.shape:
        return False
    # What the layer adds is compared: beside the states themselves a wrong one may be small.
    added = (wanted - states).double()
    off = (given.double() - wanted.double()).norm() / added.norm().clamp(min=1e-30)
    return bool(off <= _ROUNDING[torch.finfo(weight.dtype).bits])


def _width(linear: Any) -> int:
    """Columns of a layer's product."""
    return int(linear.width if isinstance(linear, PartLinear) else linear.out_features)


def _product(linear: nn.Module) -> Product:
    """A product; past the module's call where the module is one of ours, on which nobody hangs a hook."""
    return linear if hasattr(linear, "weight") else linear.forward


def _joint(*linears: nn.Module) -> Product:
    """The products of layers that read the same, side by side: one, where they are packed as one."""
    first = linears[0]
    if isinstance(first, PartLinear) and len(linears) == first.shared.parts:
        return first.shared.product.forward
    products = [_product(linear) for linear in linears]
    return lambda states: torch.cat([product(states) for product in products], dim=-1)


def as_one(*linears: nn.Module) -> Product | None:
    """One product of linear layers whose weights are made parts of one tensor; None where they are none such."""
    plain = [linear for linear in linears if type(linear) is nn.Linear]
    if len(plain) < len(linears) or len({linear.bias is None for linear in plain}) > 1:
        return None
    weight = torch.cat([linear.weight.detach() for linear in plain])
    bias = None if plain[0].bias is None else torch.cat([linear.bias.detach() for linear in plain])
    start = 0
    for linear in plain:
        end = start + linear.out_features
        linear.weight.data = weight[start:end]
        if bias is not None:
            linear.bias.data = bias[start:end]
        start = end
    return lambda states: functional.linear(states, weight, bias)
