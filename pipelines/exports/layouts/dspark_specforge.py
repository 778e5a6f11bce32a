"""DSpark as SpecForge writes it: keys under `dflash_config`, the target's embedding and head left out.

SGLang reads it. vLLM takes the architecture's name and then misses `markov_rank` at the top: it has the other formats.
"""

from pathlib import Path
from typing import Any

from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from pipelines.exports.layouts import GAMMA, READ_BY_SGLANG, Engine, sglang
from pipelines.exports.layouts._block import (
    block_size,
    block_tensors,
    draft_vocabulary,
    mask_token,
    plain_tables,
    read_block,
    sequential_head,
)
from pipelines.exports.layouts._shared import layer_config, read_files, reading
from pipelines.exports.source import Source

KINDS = ("dspark",)
ENGINES = (
    Engine("sglang", sglang("DSPARK", rest=f"--speculative-dspark-block-size {GAMMA}"), plain_tables, READ_BY_SGLANG),
)


def config(source: Source) -> dict[str, Any]:
    """`config.json`."""
    return {
        **layer_config(source, model_type="qwen3"),
        "architectures": ["DSparkDraftModel"],
        "block_size": block_size(source),
        **draft_vocabulary(source),
        "num_target_layers": source.network.shape.target_layers,
        "dflash_config": {
            "projector_type": "dspark",
            "mask_token_id": mask_token(source),
            "target_layer_ids": source.network.taps,
            "sample_from_anchor": True,
            "attention_mode": "full",
            "confidence_head_alpha": source.network.config.confidence_weight,
            **sequential_head(source),
        },
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
        sample_from_anchor=bool(inner.get("sample_from_anchor", True)),
        mask=int(inner["mask_token_id"]),
        taps=[int(layer) for layer in inner["target_layer_ids"]],
        heads=inner,
    )
