"""What all formats of feature drafts have in common: the layers' configuration, and the way back from files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from inference.errors import InputError, first_line
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_networks import Borrowed, FeatureNetwork
from inference.feature_networks._layers import DraftShape
from inference.model import CausalModel, OutputHead
from inference.taps import check_taps
from pipelines.exports.source import Source

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_MEND = "export the pair again"


def layer_config(source: Source, *, model_type: str) -> dict[str, Any]:
    """The decoder layers in the words of transformers.

    The rotary base is written twice: older readers know `rope_theta` alone, newer ones `rope_parameters`.
    """
    shape, network = source.network.shape, source.network
    text = source.target.model.config.get_text_config(decoder=True)
    head = source.target.head
    layers = network.config.layers
    found: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": network.layer_shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": layers,
        "vocab_size": shape.vocab,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "max_position_embeddings": int(text.max_position_embeddings),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    if model_type == "qwen3":
        found |= {"layer_types": ["full_attention"] * layers, "use_sliding_window": False, "sliding_window": None}
    if head.scale != 1.0:
        found["logit_scale"] = head.scale
    if head.soft_cap:
        found["final_logit_softcapping"] = head.soft_cap
    return found


def vocabulary_tensors(source: Source) -> dict[str, Tensor]:
    """`d2t` int64 `[Vd]` (target id = draft id + d2t[draft id]) and `t2d` bool `[V]`; none for a whole vocabulary."""
    ids = source.network.vocabulary
    if ids is None:
        return {}
    known = torch.zeros(source.network.shape.vocab, dtype=torch.bool)
    known[ids.cpu()] = True
    return {"d2t": ids.cpu() - torch.arange(ids.shape[0]), "t2d": known}


def stored(tensor: Tensor) -> Tensor:
    """A tensor as it is written: bf16 where that loses nothing, as with all that a draft's own file holds."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor.contiguous()
    half = tensor.to(torch.bfloat16)
    return (half if torch.equal(half.to(tensor.dtype), tensor) else tensor.float()).contiguous()


# The way back


class ExportedParts(Borrowed):
    """The target's embedding and head as an engine has them beside a draft: tables of the export where it brings some.

    Args:
        target: whose own tables stand in for missing ones.
        config: of the export; scale and soft-cap of logits are what it says.
        embedding: `[V, D]`, or None for the target's rows as they are stored.
    """

    def __init__(self, target: CausalModel, config: Mapping[str, Any], embedding: Tensor | None) -> None:
        super().__init__(target)
        table = target.embedding.get_parameter("weight").detach() if embedding is None else embedding
        self.table = table.to(target.device)
        self.scale = 1.0
        self.head = ExportedHead(target.head.linear, config)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the table, `[..., D]`."""
        return nn.functional.embedding(tokens, self.table)


class ExportedHead(OutputHead):
    """The target's output matrix with what the export's configuration puts behind it."""

    def __init__(self, linear: nn.Module, config: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self.linear = linear
        self.scale = float(config.get("logit_scale") or 1.0)
        self.soft_cap = float(config.get("final_logit_softcapping") or 0.0)


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and the tensors of an export, in fp32.

    Raises:
        InputError: missing, truncated, or not finite.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"unreadable export: {first_line(error)}", where=str(folder), mend=_MEND) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"NaN or infinite weights in {name}", where=str(folder), mend=_MEND)
    return config, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def read_shape(config: Mapping[str, Any], *, target_layers: int) -> DraftShape:
    """The shape that a configuration of layers describes."""
    rope = config.get("rope_parameters") or {}
    return DraftShape(
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        heads=int(config["num_attention_heads"]),
        kv_heads=int(config["num_key_value_heads"]),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]),
        eps=float(config["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta", config["rope_theta"])),
        vocab=int(config["vocab_size"]),
        target_layers=target_layers,
    )


def reading(read: Callable[[Path, CausalModel], FeatureNetwork]) -> Callable[[Path, CausalModel], FeatureNetwork]:
    """Turn what a damaged configuration sets off into one line."""

    def guarded(folder: Path, target: CausalModel) -> FeatureNetwork:
        try:
            return read(folder, target)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            reason = f"{type(error).__name__} {first_line(error)}"
            raise InputError(
                f"the export's configuration does not fit: {reason}", where=str(folder), mend=_MEND
            ) from None

    return guarded


def rebuilt(
    folder: Path,
    target: CausalModel,
    config: FeatureDraftConfig,
    layers: Mapping[str, Any],
    tensors: dict[str, Tensor],
    *,
    taps: list[int],
) -> FeatureNetwork:
    """A network from an export's tensors, in fp32, bound to the target as an engine binds it.

    Args:
        folder: for errors.
        target: that it reads.
        config: what the export's keys make of it.
        layers: the configuration of its layers.
        tensors: by the names that the network gives them; `d2t`, `t2d`, `lm_head.weight` and `embed_tokens.weight` have
            their usual meaning.
        taps: decoder indices.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, or the target lacks a layer.
    """
    shape = read_shape(layers, target_layers=DraftShape.of(target.model.config).target_layers)
    check_taps(taps, shape.target_layers, where=str(folder))
    vocabulary = None
    if "lm_head.weight" in tensors:
        ids = torch.arange(tensors["lm_head.weight"].shape[0])
        vocabulary = ids + tensors.pop("d2t") if "d2t" in tensors else ids
        if not bool(((vocabulary >= 0) & (vocabulary < shape.vocab)).all()):
            raise InputError("d2t names tokens that the target does not have", where=str(folder), mend=_MEND)
    tensors.pop("t2d", None)
    embedding = tensors.pop("embed_tokens.weight", None)
    network = config.build(shape, taps, vocabulary)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(torch.nan)  # so that nothing passes for loaded that is not
    try:
        missing, unknown = network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise InputError(
            f"a tensor has another shape: {' '.join(str(error).split())[:200]}", where=str(folder)
        ) from None
    lost = [name for name in missing if name in network.own_tensors()]
    if lost or unknown:
        what = f"no tensor {lost[0]}" if lost else f"a tensor that nobody reads: {unknown[0]}"
        raise InputError(f"{what} in the export", where=str(folder), mend=_MEND)
    network.to(target.device).eval().requires_grad_(False)
    network.borrow(ExportedParts(target, layers, embedding))
    return network
