"""DFlash as its authors publish it, and SGLang, vLLM, SpecForge and llama.cpp take it: neither embedding nor head."""

from pathlib import Path
from typing import Any

from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from pipelines.exports.layouts import (
    GAMMA,
    READ_BY_SGLANG,
    SERVED_BY_LLAMA_CPP,
    SERVED_BY_VLLM,
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
    unnormed,
    whole_vocabulary,
)
from pipelines.exports.layouts._shared import layer_config, read_files, reading
from pipelines.exports.source import Source

KINDS = ("dflash",)


ENGINES = (
    Engine("vllm", vllm("dflash"), unnormed, SERVED_BY_VLLM),
    Engine(
        "sglang",
        sglang("DFLASH", rest=f"--speculative-num-draft-tokens $(({GAMMA} + 1))"),
        plain_tables,
        READ_BY_SGLANG,
    ),
    Engine(
        "llama.cpp",
        llama_cpp("draft-dflash"),
        lambda source: first_reason(unnormed(source), whole_vocabulary(source)),
        SERVED_BY_LLAMA_CPP,
    ),
)


def config(source: Source) -> dict[str, Any]:
    """`config.json`."""
    return {
        **layer_config(source, model_type="qwen3"),
        "architectures": ["DFlashDraftModel"],
        "block_size": block_size(source),
        **draft_vocabulary(source),
        "num_target_layers": source.network.shape.target_layers,
        "dflash_config": {"mask_token_id": mask_token(source), "target_layer_ids": source.network.taps},
    }


tensors = block_tensors


@reading
def read(folder: Path, target: CausalModel) -> FeatureNetwork:
    """See `pipelines.exports.layouts`."""
    found, weights = read_files(folder)
    inner = found["dflash_config"]
    return read_block(
        folder,
        target,
        found,
        weights,
        block_size=int(found["block_size"]),
        sample_from_anchor=bool(inner.get("sample_from_anchor", False)),
        mask=int(inner["mask_token_id"]),
        taps=[int(layer) for layer in inner["target_layer_ids"]],
    )
