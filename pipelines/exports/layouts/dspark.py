"""DSpark as its authors publish it, flat keys, with the same values once more where other readers look for them.

vLLM, SGLang and llama.cpp load this folder. The keys are the DeepSpec dialect's; `dflash_config` repeats those that
readers of the DFlash family expect there.
"""

from pathlib import Path
from typing import Any

from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from pipelines.exports.layouts import (
    GAMMA,
    LOADED_BY_VLLM,
    READ_BY_SGLANG,
    SERVED_BY_LLAMA_CPP,
    Engine,
    llama_cpp,
    sglang,
    vllm,
)
from pipelines.exports.layouts._block import (
    block_size,
    block_tensors,
    draft_vocabulary,
    first_reason,
    mask_token,
    plain_tables,
    read_block,
    sequential_head,
    unnormed,
)
from pipelines.exports.layouts._shared import layer_config, read_files, reading
from pipelines.exports.source import Source

KINDS = ("dspark",)


def vanilla(source: Source) -> str:
    """Why an engine with the plain sequential head alone cannot serve a draft."""
    plain = sequential_head(source)["markov_head_type"] == "vanilla"
    return first_reason(unnormed(source), "" if plain else "it has the plain sequential head alone")


ENGINES = (
    Engine(
        "vllm",
        vllm("dspark", extra=', "draft_sample_method": "probabilistic"'),
        vanilla,
        LOADED_BY_VLLM,
    ),
    Engine("sglang", sglang("DSPARK", rest=f"--speculative-dspark-block-size {GAMMA}"), plain_tables, READ_BY_SGLANG),
    Engine(
        "llama.cpp",
        llama_cpp("draft-dspark"),
        vanilla,
        SERVED_BY_LLAMA_CPP,
    ),
)


def config(source: Source) -> dict[str, Any]:
    """`config.json`."""
    heads, mask = sequential_head(source), mask_token(source)
    return {
        **layer_config(source, model_type="qwen3"),
        "architectures": ["Qwen3DSparkModel"],
        "block_size": block_size(source),
        **draft_vocabulary(source),
        "num_target_layers": source.network.shape.target_layers,
        "num_anchors": source.network.config.anchors,
        "mask_token_id": mask,
        "target_layer_ids": source.network.taps,
        "sample_from_anchor": True,
        **heads,
        "dflash_config": {
            "projector_type": "dspark",
            "mask_token_id": mask,
            "target_layer_ids": source.network.taps,
            "sample_from_anchor": True,
            **heads,
        },
    }


tensors = block_tensors


@reading
def read(folder: Path, target: CausalModel) -> FeatureNetwork:
    """See `pipelines.exports.layouts`."""
    found, weights = read_files(folder)
    return read_block(
        folder,
        target,
        found,
        weights,
        block_size=int(found["block_size"]),
        sample_from_anchor=bool(found.get("sample_from_anchor", True)),
        mask=int(found["mask_token_id"]),
        taps=[int(layer) for layer in found["target_layer_ids"]],
        heads=found,
    )
