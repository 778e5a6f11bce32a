"""DSpark in the format of the speculators library, which vLLM serves from the folder alone and llama.cpp converts."""

from pathlib import Path
from typing import Any

from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from pipelines.exports.layouts import LOADED_BY_VLLM, SERVED_BY_LLAMA_CPP, Engine, llama_cpp, vllm
from pipelines.exports.layouts._block import (
    block_size,
    block_tensors,
    mask_token,
    read_block,
    sequential_head,
)
from pipelines.exports.layouts._shared import layer_config, read_files, reading
from pipelines.exports.layouts._speculators import speculators_config
from pipelines.exports.layouts.dspark import vanilla
from pipelines.exports.source import Source

KINDS = ("dspark",)


ENGINES = (
    Engine("vllm", vllm("dspark", extra=', "draft_sample_method": "probabilistic"'), vanilla, LOADED_BY_VLLM),
    Engine("llama.cpp", llama_cpp("draft-dspark"), vanilla, SERVED_BY_LLAMA_CPP),
)


def config(source: Source) -> dict[str, Any]:
    """`config.json`; layer ids count one higher than decoder indices here."""
    return {
        **speculators_config(source, "dspark", architecture="DSparkSpeculator"),
        "transformer_layer_config": layer_config(source, model_type="qwen3"),
        "block_size": block_size(source),
        "aux_hidden_state_layer_ids": [tap + 1 for tap in source.network.taps],
        "mask_token_id": mask_token(source),
        "draft_vocab_size": source.head().shape[0],
        "target_hidden_size": source.network.shape.hidden,
        "sample_from_anchor": True,
        **sequential_head(source),
    }


tensors = block_tensors


@reading
def read(folder: Path, target: CausalModel) -> FeatureNetwork:
    """See `pipelines.exports.layouts`."""
    found, weights = read_files(folder)
    return read_block(
        folder,
        target,
        found["transformer_layer_config"],
        weights,
        block_size=int(found["block_size"]),
        sample_from_anchor=bool(found.get("sample_from_anchor", False)),
        mask=int(found["mask_token_id"]),
        taps=[int(layer) - 1 for layer in found["aux_hidden_state_layer_ids"]],
        heads=found,
    )
