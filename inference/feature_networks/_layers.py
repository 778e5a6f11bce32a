"""Layers shared by all drafts that read target features: attention over projected features and the block itself.

Tensor names follow the DFlash and DSpark checkpoints (`fc`, `hidden_norm`, `layers.i.self_attn.q_proj`, ...). The
shapes come from a small description of the target, so no model family is named here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig

from inference.lean import Product, as_one

# cuDNN's attention builds a plan for every new shape, and packed batches have a new shape every step: on an H200 that
# took 80 % of an EAGLE-3 step.
_MASKED_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

KeysValues = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, `[batch, kv_heads, T, head_dim]`."""


@dataclass(frozen=True)
class DraftShape:
    """What a draft takes over from its target.

    Attributes:
        hidden: hidden size D, of both.
        intermediate: width of the feed-forward part.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        eps: of the norms.
        rope_theta: base of the rotary positions.
        vocab: tokens of the target.
        target_layers: decoder layers of the target.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    vocab: int
    target_layers: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "DraftShape":
        """The shape a draft for a model of this configuration has; what a family lacks gets the usual value."""
        text = config.get_text_config(decoder=True)
        heads = int(text.num_attention_heads)
        return cls(
            hidden=int(text.hidden_size),
            intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads) // 2 * 2,
            eps=float(getattr(text, "rms_norm_eps", None) or 1e-6),
            rope_theta=_rope_theta(getattr(text, "rope_parameters", None)),
            vocab=int(text.vocab_size),
            target_layers=int(text.num_hidden_layers),
        )


def _rope_theta(parameters: Any) -> float:
    """The base of full attention; some families keep one set of parameters per kind of layer."""
    if isinstance(parameters, dict):
        inner = parameters.get("full_attention", parameters)
        if isinstance(inner, dict) and inner.get("rope_theta"):
            return float(inner["rope_theta"])
    return 10_000.0


Rope = tuple[Tensor, Tensor]
"""Cosines and sines of positions, `[batch, 1, T, head_dim]`."""


def rotary(positions: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """Cosines and sines for positions `[batch, T]`: two tensors `[batch, 1, T, head_dim]`, halves repeated."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions[:, None, :, None].double() * theta**-exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, rope: Rope) -> Tensor:
    """Rotate states `[batch, heads, T, head_dim]` to their positions."""
    cos, sin = rope
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention without copying keys: the queries of a group are stacked as further rows.

    Args:
        queries: `[batch, heads, Q, head_dim]`.
        keys: `[batch, kv_heads, K, head_dim]`.
        values: likewise.
        mask: bool `[batch, 1, Q, K]`, true where a query sees a key; None lets all see all.

    Returns:
        `[batch, Q, heads * head_dim]`. A query that sees nothing gets zeros.
    """
    # Under autocast norms and rotations leave fp32 behind.
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)
    batch, heads, rows, width = queries.shape
    groups = heads // keys.shape[1]
    stacked = queries.reshape(batch, keys.shape[1], groups * rows, width)
    if mask is None:
        mixed = functional.scaled_dot_product_attention(stacked, keys, values).reshape(batch, heads, rows, width)
    else:
        # The softmax over nothing is not a number; such a query attends to everything and is zeroed.
        seen = mask.any(-1, keepdim=True)
        mask = (mask | ~seen).repeat(1, 1, groups, 1)
        with sdpa_kernel(_MASKED_BACKENDS):
            mixed = functional.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask)
        mixed = mixed.reshape(batch, heads, rows, width) * seen
    return mixed.transpose(1, 2).reshape(batch, rows, heads * width)


class Norm(nn.RMSNorm):
    """An RMS norm that takes states of another arithmetic than its weight's, as autocast gives them, in one kernel and
    gives them back in theirs."""

    def forward(self, states: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        if states.dtype == self.weight.dtype:
            return super().forward(states)
        return super().forward(states.to(self.weight.dtype)).to(states.dtype)


class DraftAttention(nn.Module):
    """Queries from the block; keys and values from the block and from whatever context is handed in."""

    def __init__(self, shape: DraftShape, *, inputs: int, qk_norm: bool) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(inputs, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(inputs, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(inputs, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = Norm(shape.head_dim, eps=shape.eps) if qk_norm else nn.Identity()
        self.k_norm = Norm(shape.head_dim, eps=shape.eps) if qk_norm else nn.Identity()
        self._joint: Product | None = None

    def join_weights(self) -> None:
        """Let the three products of `projected` be one; see `inference.lean.as_one`. Once, as for lean layers."""
        if self._joint is None:
            self._joint = as_one(self.q_proj, self.k_proj, self.v_proj)

    def projected(self, states: Tensor, tables: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same states, for passes of few tokens, where kernels count.

        Args:
            states: `[batch, T, inputs]`.
            tables: of their positions, as `inference.lean.rolled_tables` lays them out.

        Returns:
            Queries `[batch, T, heads, head_dim]`, keys and values `[batch, T, kv_heads, head_dim]`.
        """
        heads, both = self.shape.heads, self.shape.heads + self.shape.kv_heads
        cosine, sine = tables
        apart = self.q_proj, self.k_proj, self.v_proj
        joint = torch.cat([each(states) for each in apart], dim=-1) if self._joint is None else self._joint(states)
        rows = joint.unflatten(-1, (-1, self.shape.head_dim))
        turned = rows[:, :, :both]
        if not isinstance(self.q_norm, nn.Identity):
            turned = torch.cat([self.q_norm(turned[:, :, :heads]), self.k_norm(turned[:, :, heads:])], dim=2)
        turned = torch.addcmul(turned * cosine, turned.roll(self.shape.head_dim // 2, -1), sine)
        return turned[:, :, :heads], turned[:, :, heads:], rows[:, :, both:]

    def rope(self, positions: Tensor, like: Tensor) -> Rope:
        """Of positions `[batch, T]`, in the arithmetic of states; the same for all layers of a draft."""
        return rotary(positions, head_dim=self.shape.head_dim, theta=self.shape.rope_theta, dtype=like.dtype)

    def keys_values(self, states: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys at their positions, and values, `[batch, kv_heads, T, head_dim]`, of states `[batch, T, inputs]`."""
        batch, length, _ = states.shape
        split = (batch, length, self.shape.kv_heads, self.shape.head_dim)
        keys = self.k_norm(self.k_proj(states).reshape(split)).transpose(1, 2)
        values = self.v_proj(states).reshape(split).transpose(1, 2)
        return rotate(keys, rope), values

    def queries(self, states: Tensor, rope: Rope) -> Tensor:
        """Queries at their positions, `[batch, heads, Q, head_dim]`, of states `[batch, Q, inputs]`."""
        batch, length, _ = states.shape
        queries = self.q_proj(states).reshape(batch, length, self.shape.heads, self.shape.head_dim)
        return rotate(self.q_norm(queries).transpose(1, 2), rope)


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)
        self._gated: Product | None = None

    def join_weights(self) -> None:
        """Let the two products that read the same be one; see `inference.lean.as_one`. Once, as for lean layers."""
        if self._gated is None:
            self._gated = as_one(self.gate_proj, self.up_proj)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        if self._gated is not None:
            gate, up = self._gated(states).chunk(2, dim=-1)
            joined: Tensor = self.down_proj(functional.silu(gate) * up)
            return joined
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))
        return result


class DraftLayer(nn.Module):
    """A pre-norm layer over block states, whose attention also sees context keys and values it is handed."""

    def __init__(self, shape: DraftShape, *, qk_norm: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, eps=shape.eps)
        self.self_attn = DraftAttention(shape, inputs=shape.hidden, qk_norm=qk_norm)
        self.post_attention_layernorm = Norm(shape.hidden, eps=shape.eps)
        self.mlp = DraftMLP(shape)

    def forward(self, block: Tensor, rope: Rope, context: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Block states `[batch, Q, D]` after the layer.

        Args:
            block: `[batch, Q, D]`.
            rope: of its positions.
            context: keys and values `[batch, kv_heads, T, head_dim]`.
            mask: bool `[batch, 1, Q, T + Q]`, context first; None lets every query see everything.
        """
        normed = self.input_layernorm(block)
        keys, values = self.self_attn.keys_values(normed, rope)
        keys, values = torch.cat([context[0], keys], dim=2), torch.cat([context[1], values], dim=2)
        mixed = attend(self.self_attn.queries(normed, rope), keys, values, mask)
        block = block + self.self_attn.o_proj(mixed)
        result: Tensor = block + self.mlp(self.post_attention_layernorm(block))
        return result


def same_parts(source: nn.Module, size: int) -> bool:
    """Whether a target's layer consists of the parts a draft layer has, so that its weights may be copied by name.

    The parts: four projections without bias, SwiGLU, and two norms that are plain RMS norms (some families store a
    weight less one); norms of queries and keys may be there besides.

    Args:
        source: a decoder layer of the target.
        size: hidden size D.
    """
    projections = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    norms = {"input_layernorm", "post_attention_layernorm"}
    parts = {
        *projections,
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"{n}.weight" for n in norms),
    }
    names = {name for name, _ in source.named_parameters()}
    if not parts <= names <= {*parts, "self_attn.q_norm.weight", "self_attn.k_norm.weight"}:
        return False
    return all(plain_norm(source.get_submodule(name), size) for name in norms)


@torch.no_grad()
def plain_norm(norm: nn.Module, size: int) -> bool:
    """Whether a norm over D numbers is `x / rms(x) * weight`."""
    weight = norm.get_parameter("weight")
    probe = torch.linspace(-1.0, 2.0, size, dtype=weight.dtype, device=weight.device)[None]
    wanted = functional.rms_norm(probe, (size,), weight)
    return bool(torch.allclose(norm(probe), wanted, rtol=1e-2, atol=1e-3))
