"""EAGLE-3 as SGLang, vLLM and llama.cpp take it: a flat llama configuration, the layer as `midlayer`.

The same key means two things. vLLM and llama.cpp read `eagle_aux_hidden_state_layer_ids` at the top, one higher than
decoder indices; SGLang reads the one inside `eagle_config` and adds one itself, so decoder indices stand there.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from pipelines.exports.layouts import GAMMA, SERVED_BY_LLAMA_CPP, SERVED_BY_VLLM, Engine, llama_cpp, sglang, vllm
from pipelines.exports.layouts._eagle3 import aux_layers, layer_tensors, norms_heads, read_eagle3
from pipelines.exports.layouts._shared import layer_config, read_files, reading
from pipelines.exports.source import Source

KINDS = ("eagle3",)
_LAYERS = "eagle_aux_hidden_state_layer_ids"


def _norms(source: Source) -> str:
    return "its layer norms queries and keys, which a llama layer does not" if norms_heads(source) else ""


def _three_taps(source: Source) -> str:
    return _norms(source) or ("" if len(source.network.taps) == 3 else "it takes drafts that read three layers")


ENGINES = (
    Engine("vllm", vllm("eagle3"), _norms, SERVED_BY_VLLM),
    Engine(
        "sglang",
        sglang("EAGLE3", rest=f"--speculative-num-steps {GAMMA} --speculative-eagle-topk 1"),
        _three_taps,
        "0.5.23: not served; names and keys compared with its loader",
    ),
    Engine("llama.cpp", llama_cpp("draft-eagle3"), _three_taps, SERVED_BY_LLAMA_CPP),
)


def config(source: Source) -> dict[str, Any]:
    """`config.json`."""
    aux = aux_layers(source)
    return {
        **layer_config(source, model_type="llama"),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": source.head().shape[0],
        "target_hidden_size": source.network.shape.hidden,
        "num_aux_hidden_states": len(aux),
        "norm_before_residual": False,
        _LAYERS: aux,
        "eagle_config": {_LAYERS: source.network.taps, "use_aux_hidden_state": True},
    }


def tensors(source: Source) -> dict[str, Tensor]:
    """By the names of EAGLE-3 checkpoints."""
    return layer_tensors(source, layer="midlayer.")


@reading
def read(folder: Path, target: CausalModel) -> FeatureNetwork:
    """See `pipelines.exports.layouts`."""
    found, weights = read_files(folder)
    aux = found[_LAYERS]
    if [layer - 1 for layer in aux] != found["eagle_config"][_LAYERS]:
        raise ValueError(f"{_LAYERS} at the top is to be one higher than inside eagle_config")
    before = bool(found.get("norm_before_residual", False))
    return read_eagle3(folder, target, found, weights, aux=aux, norm_before_residual=before)
