"""EAGLE-3 in the format of the speculators library, which vLLM serves from the folder alone."""

from pathlib import Path
from typing import Any

from torch import Tensor

from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from pipelines.exports.layouts import SERVED_BY_VLLM, Engine, vllm
from pipelines.exports.layouts._eagle3 import aux_layers, layer_tensors, norms_heads, read_eagle3
from pipelines.exports.layouts._shared import layer_config, read_files, reading
from pipelines.exports.layouts._speculators import speculators_config
from pipelines.exports.source import Source

KINDS = ("eagle3",)
ENGINES = (Engine("vllm", vllm("eagle3"), tried=SERVED_BY_VLLM),)


def config(source: Source) -> dict[str, Any]:
    """`config.json`; a layer that norms queries and keys is a qwen3 one."""
    model_type = "qwen3" if norms_heads(source) else "llama"
    return {
        **speculators_config(source, "eagle3", architecture="Eagle3Speculator"),
        "transformer_layer_config": layer_config(source, model_type=model_type),
        "eagle_aux_hidden_state_layer_ids": aux_layers(source),
        "draft_vocab_size": source.head().shape[0],
        "target_hidden_size": source.network.shape.hidden,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
    }


def tensors(source: Source) -> dict[str, Tensor]:
    """By the names of the speculators library."""
    return layer_tensors(source, layer="layers.0.")


@reading
def read(folder: Path, target: CausalModel) -> FeatureNetwork:
    """See `pipelines.exports.layouts`. The library's default is the norm before the residual."""
    found, weights = read_files(folder)
    return read_eagle3(
        folder,
        target,
        found["transformer_layer_config"],
        weights,
        aux=found["eagle_aux_hidden_state_layer_ids"],
        norm_before_residual=bool(found.get("norm_before_residual", True)),
    )
