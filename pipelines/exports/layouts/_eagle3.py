"""EAGLE-3 in both formats: what they share. Layer ids count one higher than decoder indices."""

from pathlib import Path
from typing import Any

from torch import Tensor

from inference.errors import InputError
from inference.feature_drafts.eagle3 import Config
from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from pipelines.exports.layouts._shared import rebuilt, vocabulary_tensors
from pipelines.exports.source import Source

_LONGEST = 16
"""Steps of a block: files of this kind do not say, engines take as many as they are asked for."""


def norms_heads(source: Source) -> bool:
    """Whether its layer norms queries and keys, as a qwen3 layer does and a llama layer does not."""
    config = source.network.config
    assert isinstance(config, Config)
    return config.qk_norm


def aux_layers(source: Source) -> list[int]:
    """Ids of the tapped layers: the output of decoder layer i is hidden state i + 1."""
    return [tap + 1 for tap in source.network.taps]


def layer_tensors(source: Source, *, layer: str) -> dict[str, Tensor]:
    """Tensors with the one layer under a name; the head is always there, the embedding where it is not the target's."""
    own = {name.replace("layers.0.", layer): tensor for name, tensor in source.network.own_tensors().items()}
    own = {name: tensor for name, tensor in own.items() if not name.startswith("lm_head")}
    found = own | {"lm_head.weight": source.head()} | vocabulary_tensors(source)
    return found | ({"embed_tokens.weight": source.embedding()} if source.own_embedding else {})


def read_eagle3(
    folder: Path,
    target: CausalModel,
    layers: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    aux: list[int],
    norm_before_residual: bool,
) -> FeatureNetwork:
    """The network an engine makes of EAGLE-3 files.

    Raises:
        InputError: they describe another computation than ours.
    """
    if norm_before_residual:
        raise InputError("the residual is the hidden state before its norm", where=str(folder), mend="export it again")
    named = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    config = Config(block=_LONGEST, qk_norm="layers.0.self_attn.q_norm.weight" in named)
    return rebuilt(folder, target, config, layers, named, taps=[layer - 1 for layer in aux])
